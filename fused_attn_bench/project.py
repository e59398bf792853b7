"""Whose code is measured: what a project's own command line passes to the engine's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Project:
    """A repository, and what the engine has to know of it; without one it is the repository around the working folder.

    Args:
        program: how the command line is called, for messages.
        launch: what Python is given to call it.
        title: of the page.
        root: of the repository; None for the one around the working folder.
        files: Python files that declare its operations, loaded for every command and always as they are here.
        watched: the provider that commits are compared by, and whose failures end a run with an error; empty where every provider counts.
        build: from a commit's tree, and whether native code for a GPU is wanted, to what has to be run there first.
        commands: further commands by name: the module that has ``add_arguments`` and ``run``, and a line on it.
    """

    program: str = "fused-attn-bench"
    launch: tuple[str, ...] = ("-m", "fused_attn_bench")
    title: str = "Benchmarks"
    root: Path | None = None
    files: tuple[Path, ...] = ()
    watched: str = ""
    build: Callable[[Path, bool], None] = lambda tree, native: None
    commands: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def repository(self) -> Path:
        """The root; the working folder where there is no repository."""
        if self.root is not None:
            return self.root
        try:
            return Path(git(Path(), "rev-parse", "--show-toplevel")).resolve()
        except ValueError:
            return Path().resolve()

    @property
    def packages(self) -> list[Path]:
        """The folders of the packages that its files belong to."""
        found = []
        for path in self.files:
            package = path.resolve().parent
            while (package.parent / "__init__.py").is_file():
                package = package.parent
            if (package / "__init__.py").is_file():
                found.append(package)
        return list(dict.fromkeys(found))


def git(root: Path, *arguments: str) -> str:
    """What git prints in a repository.

    Raises:
        ValueError: git's own message.
    """
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"commits are compared with git, which must be installed; got: {error}") from None
    if done.returncode:
        raise ValueError(f"git {arguments[0]} must succeed in {root}; it says: {done.stderr.strip() or done.returncode}")
    return done.stdout.strip()


def why_no_commit(root: Path, name: str) -> str:
    """Why git does not know a name as a commit of the repository; empty where it does."""
    try:
        git(root, "rev-parse", "--git-dir")
    except ValueError as error:
        return str(error)
    try:
        git(root, "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
    except ValueError:
        return f"no commit of {root}"
    return ""
