"""What x-transformers asserts, and what is not there: one sentence each, with the package's class of error."""

from __future__ import annotations


def needs(holds: bool, what: str, got: str, advice: str) -> None:
    """Raises AssertionError, as the package does, unless ``holds``.

    Example:
        >>> needs(False, "depth must be given", "None", "Pass depth=6")
        Traceback (most recent call last):
            ...
        AssertionError: depth must be given; got None. Pass depth=6.
    """
    if not holds:
        raise AssertionError(f"{what}; got {got}. {advice}.")


def at_most_one(**options: bool) -> None:
    """Raises AssertionError where several of the options are on."""
    given = [name for name, on in options.items() if on]
    needs(len(given) < 2, f"at most one of {', '.join(options)} must be given", " and ".join(given), "Choose one")


def not_with_flash(flash: bool, **options: bool) -> None:
    """Raises AssertionError where flash meets an option that the package's flash path has not."""
    given = [name for name, on in options.items() if flash and on]
    needs(not given, "flash must be False with " + ", ".join(given), "flash=True", "Leave flash out: kernels run all the same")


def refuse(option: str, advice: str) -> NotImplementedError:
    """The error of an option that is left out."""
    return NotImplementedError(f"{option} must be left out; got it given, and these layers do not have it. {advice}.")
