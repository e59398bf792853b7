"""Commits of a repository: measured by one and the same code, bisected, and nothing of theirs left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__ as cli
from benchmarks.project import PROJECT
from fused_attn_bench import bisection, compare, project, worker
from fused_attn_bench.case import Case
from fused_attn_bench.compare import Comparison, Interrupted
from fused_attn_bench.harness import Setup
from fused_attn_bench.history import History
from fused_attn_bench.operation import OPERATIONS, Operation
from fused_attn_bench.project import Project
from fused_attn_bench.results import Result
from fused_attn_bench.sides import PREFIX, Commits, remove_leftovers
from fused_attn_bench.significance import Difference

CASES = [Case.parse(f"attention/plain/fwd/float32/1x1x{n}x8") for n in (8, 16, 32)]


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is not how fast anything is."""
    monkeypatch.setattr("fused_attn_bench.harness.WARM_UP", 0.0)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four commits of this package; the third makes attention sleep."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q", "-b", "main")
    subprocess.run(["cp", "-r", str(Path(__file__).parents[1] / "fused_attn"), str(root)], check=True)
    for path in root.rglob("*.so"):
        path.unlink()
    functional = root / "fused_attn" / "functional.py"
    original = functional.read_text()
    slow = (
        original
        + "\n\n_fast = attention\n\n\ndef attention(*args, **kwargs):\n    import time\n\n    time.sleep(0.02)\n    return _fast(*args, **kwargs)\n"
    )
    broken = "raise ImportError('this commit is broken')\n"
    for tag, text in (("one", original), ("two", original + "# two\n"), ("three", slow), ("four", slow + "# four\n"), ("broken", broken)):
        functional.write_text(text)
        git("add", "-A")
        git("commit", "-q", "-m", tag)
        git("tag", tag)
    monkeypatch.setattr(cli, "PROJECT", replace(PROJECT, root=root))
    return root


@pytest.mark.slow
@pytest.mark.peers
def test_commits_are_compared_and_bisected(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call of microseconds that begins to sleep for 20 ms: no noise hides that."""
    options = ["--device", "cpu", "--case", CASES[0].name, "--seconds", "0", "--launches", "3", "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["compare", "three", "two", *options]) == 0
    assert "faster" in capsys.readouterr().out
    assert cli.main(["compare", "one", "broken", *options]) == 4
    assert "this commit is broken" in capsys.readouterr().out
    mine = tmp_path / "mine.py"
    mine.write_text("from benchmarks.providers import _fused, provider\n\nprovider('mine', 'attention')(_fused('auto'))\n")
    monkeypatch.setattr(OPERATIONS["attention"], "providers", dict(OPERATIONS["attention"].providers))
    assert cli.main(["compare", "one", "three", "--of", "mine", "--load", str(mine), *options, "--fail-on", "900%"]) == 1
    assert "slower" in capsys.readouterr().out
    assert cli.main(["compare", "one", "broken", "--of", "mine", "--load", str(mine), *options]) == 4
    assert cli.main(["bisect", "one", "four", "--json", str(tmp_path / "b.json"), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].endswith("two") and lines[-1].endswith(": three")
    written = json.loads((tmp_path / "b.json").read_text())
    steps = History(tmp_path / "h.sqlite").comparisons()[-len(written["steps"]) :]
    assert [s["verdict"] for s in written["steps"]] == [s.verdict for s in steps] and written["steps"][0]["verdict"] == "slower"
    assert subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout.count("\n") == 1


def commit_of(index: int) -> str:
    return f"c{index:03}"


@pytest.mark.quick
@pytest.mark.parametrize("first", range(12))
@pytest.mark.parametrize("lost", [(), (3, 4, 5)], ids=["all run", "three do not build"])
def test_the_first_slow_commit_is_found(first: int, lost: tuple[int, ...]) -> None:
    commits = [commit_of(i) for i in range(12)]
    measured: list[str] = []

    def measure(commit: str) -> Comparison:
        measured.append(commit)
        index = commits.index(commit)
        if index in lost:
            return Comparison("c", Result("c", "p"), Result("c", "p", "failed", "does not build"))
        effect = 0.10 if index >= first else 0.0
        return Comparison("c", Result("c", "p"), Result("c", "p"), Difference(effect, effect, effect, 1e-6 if effect else 0.5, 8))

    found = bisection.search("good", commits, measure)
    assert len(measured) == len(set(measured)) <= 5 + len(lost)
    hidden = {commit_of(i) for i in lost}
    reachable = [c for c in commits if c not in hidden]
    expected = next(c for c in reachable if commits.index(c) >= first)
    assert found.first_bad == expected
    assert found.last_good == (reachable[reachable.index(expected) - 1] if expected != reachable[0] else "good")
    assert set(found.between) <= hidden


@pytest.mark.quick
def test_there_must_be_something_to_find(repository: Path) -> None:
    same = Comparison("c", Result("c", "p"), Result("c", "p"), Difference(0.0, 0.0, 0.0, 0.5, 8))
    with pytest.raises(ValueError, match="BAD must be slower than GOOD beyond the noise; the verdict is no change"):
        bisection.search("good", ["c"], lambda commit: same)
    assert len(bisection.commits(repository, "one", "four")) == 3
    with pytest.raises(ValueError, match="BAD must come after GOOD"):
        bisection.commits(repository, "four", "one")
    with pytest.raises(ValueError, match=r"git rev-list must succeed in .*; it says: "):
        bisection.commits(repository, "nowhere", "one")


@pytest.mark.quick
def test_a_process_that_dies_says_its_last_words(tmp_path: Path) -> None:
    process = worker.Process(tmp_path, "a folder without fused_attn", PROJECT)
    try:
        with pytest.raises(
            RuntimeError,
            match=r"a folder without fused_attn ended with code 1: .*fused_attn/__init__.py would be measured instead of the commit's",
        ):
            worker.Remote(process, CASES[0], "eager", Setup())
    finally:
        process.close()


SLOW_NOW = Comparison("c", Result("c", "p"), Result("c", "p"), Difference(0.1, 0.09, 0.11, 1e-6, 8))
SAME_THEN = Comparison("c", Result("c", "p"), Result("c", "p"), Difference(0.0, -0.01, 0.01, 0.5, 8))


@pytest.mark.quick
def test_ctrl_c_leaves_what_a_search_knows() -> None:
    commits, answers = [commit_of(i) for i in range(8)], iter([SLOW_NOW, SAME_THEN])

    def measure(commit: str) -> Comparison:
        for answer in answers:
            return answer
        raise KeyboardInterrupt

    found = bisection.search("good", commits, measure)
    assert (found.last_good, found.first_bad, found.left) == ("c003", "c007", ("c004", "c005", "c006")) and len(found.steps) == 2


@pytest.mark.quick
@pytest.mark.parametrize("at", [1, 2])
def test_bisect_shows_what_ctrl_c_left(
    at: int, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the comparison of BAD, or of the commit after it; the one under way is shown and kept too."""
    calls = 0

    def compared(*arguments: object) -> list[Comparison]:
        nonlocal calls
        calls += 1
        found = replace(SLOW_NOW, case=CASES[0].name)
        if calls == at:
            raise Interrupted([found])
        return [found]

    monkeypatch.setattr("fused_attn_bench.compare.compare", compared)
    monkeypatch.setattr("fused_attn_bench.sides.Commits.__enter__", lambda self: self)
    monkeypatch.setattr("fused_attn_bench.sides.Commits.__exit__", lambda *arguments: None)
    options = ["--device", "cpu", "--case", CASES[0].name, "--db", str(tmp_path / "h.sqlite"), "--json", str(tmp_path / "b.json")]
    assert cli.main(["bisect", "one", "four", *options]) == 130
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "b.json").read_text())
    assert shown.count(", interrupted") == 1 and written["code"] == 130
    assert len(History(tmp_path / "h.sqlite").comparisons()) == len(written["steps"]) == at
    if at == 1:
        assert "interrupted; BAD is not judged yet, and 2 commits between GOOD and BAD are left" in shown and len(written["left"]) == 3
    else:
        assert "interrupted; 1 commits are judged, 2 are left: " in shown and "\nlast good " in shown and "\nfirst slow " in shown
        assert len(written["left"]) == 2 and written["first_bad"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("difference", "status", "code"),
    [
        (Difference(0.01, -0.06, 0.08, 0.5, 8), "ok", 3),
        (None, "failed", 4),
        (None, "wrong", 1),
        (None, "refused", 3),
        (Difference(0.0, -0.01, 0.01, 0.5, 8), "ok", 2),
    ],
)
def test_bisect_without_a_slow_end(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, difference: Difference | None, status: str, code: int
) -> None:
    """Undecided, wrong and failed are not the user's mistake; "no change" is."""
    compared = [Comparison("c", Result("c", "p", "refused" if status == "refused" else "ok"), Result("c", "p", status), difference)]
    monkeypatch.setattr("fused_attn_bench.compare.compare", lambda *arguments: compared)
    monkeypatch.setattr("fused_attn_bench.sides.Commits.__enter__", lambda self: self)
    monkeypatch.setattr("fused_attn_bench.sides.Commits.__exit__", lambda *arguments: None)
    options = ["--device", "cpu", "--case", CASES[0].name, "--db", str(tmp_path / "h.sqlite")]
    assert cli.main(["bisect", "one", "four", *options]) == code


@pytest.mark.quick
def test_leftovers_of_a_killed_comparison_are_removed(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    left, running, other = (tmp_path / f"{PREFIX}{name}" for name in (f"{ended.pid}-abc", f"{os.getpid()}-abc", "mine"))
    for folder in (left, running, other):
        folder.mkdir()
        subprocess.run(["git", "worktree", "add", "--detach", "-q", str(folder / "0"), "one"], cwd=repository, check=True)
    remove_leftovers(repository)
    assert not left.exists() and (running / "0").exists() and (other / "0").exists()
    known = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True).stdout
    assert str(left) not in known and str(running) in known


@pytest.mark.quick
def test_a_renamed_file_of_operations_is_taken_from_each_commit(tmp_path: Path) -> None:
    """By the name that it had then: the file as it is here would measure the same code twice."""
    root = tmp_path / "repository"
    root.mkdir()

    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=root, check=True, capture_output=True)

    git("init", "-q")
    (root / "old.py").write_text("VALUE = 1\n" * 20)
    git("add", "-A")
    git("commit", "-qm", "old")
    git("worktree", "add", "--detach", "-q", str(tmp_path / "tree"))
    git("mv", "old.py", "new.py")
    (root / "extra.py").write_text("")
    assert worker._within(tmp_path / "tree", root, root / "new.py") == tmp_path / "tree" / "old.py"
    assert worker._within(tmp_path / "tree", root, root / "extra.py") == root / "extra.py"
    assert worker._within(root, root, root / "new.py") == root / "new.py"
    assert worker._within(root, root, tmp_path / "elsewhere.py") == tmp_path / "elsewhere.py"


@pytest.mark.quick
def test_a_name_that_is_neither_provider_nor_commit(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert project.why_no_commit(repository, "one") == ""
    assert project.why_no_commit(repository, "nowhere") == f"no commit of {repository}"
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert "not a git repository" in project.why_no_commit(tmp_path / "folder", "one")
    monkeypatch.setenv("PATH", "")
    assert "git, which must be installed" in project.why_no_commit(repository, "one")


USES = """
from fused_attn_bench import Operation
from vendored.factor import FACTOR

twice = Operation("twice", ("n",), lambda make, sizes: {"x": make.normal(sizes["n"])}, lambda x: 2 * x, cases=["plain/fwd/float32/8"])
twice.provider("mine")(lambda x: x * FACTOR)
"""


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """A repository whose code lies in a submodule, which has one itself; of two commits the second one's submodule is right."""

    def git(folder: Path, *arguments: str) -> None:
        options = ("-c", "user.name=n", "-c", "user.email=e", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *options, *arguments], cwd=folder, check=True, capture_output=True)

    inner, vendored, root = (tmp_path / name for name in ("inner", "vendored", "root"))
    for folder in (inner, vendored, root):
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
    (inner / "values.py").write_text("VALUE = 2\n")
    git(inner, "add", "-A")
    git(inner, "commit", "-qm", "values")
    git(vendored, "submodule", "--quiet", "add", str(inner), "inner")
    (root / "declared.py").write_text(USES)
    for tag, text in (("wrong", "FACTOR = 3\n"), ("right", "from vendored.inner.values import VALUE as FACTOR\n")):
        (vendored / "factor.py").write_text(text)
        git(vendored, "add", "-A")
        git(vendored, "commit", "-qm", tag)
        if tag == "wrong":
            git(root, "submodule", "--quiet", "add", str(vendored), "vendored")
            git(root, "submodule", "--quiet", "update", "--init", "--recursive")
        else:
            git(root / "vendored", "pull", "-q", "origin", "main")
        git(root, "add", "-A")
        git(root, "commit", "-qm", tag)
        git(root, "tag", tag)
    for folder in (inner, vendored):
        folder.rename(folder.with_name(f"{folder.name}, gone"))
    return root


@pytest.mark.quick
def test_code_of_submodules_is_the_commit_s(nested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the servers have gone: the repository has them."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(OPERATIONS)
    case, setup = Case.parse("twice/plain/fwd/float32/8"), Setup(seconds=0.0, rounds=2)
    config = (nested / ".git" / "config").read_text()
    try:
        Operation("twice", ("n",), lambda make, sizes: {"x": make.normal(sizes["n"])}, lambda x: 2 * x)
        with Commits(("wrong", "right"), "mine", setup, Project(root=nested), load=[nested / "declared.py"]) as two:
            (found,) = compare.compare(two, [case], setup, compare.Plan(1, 1))
        assert (found.a.status, found.b.status) == ("wrong", "ok"), found.reason
        subprocess.run(["git", "submodule", "deinit", "-q", "--force", "--all"], cwd=nested, check=True)
        with Commits(("wrong", "right"), "mine", setup, Project(root=nested)) as two:
            assert two.absent == [[], []], "git has them although they are not checked out"
        subprocess.run(["rm", "-r", str(nested / ".git" / "modules" / "vendored" / "modules")], check=True)
        with Commits(("wrong", "right"), "mine", setup, Project(root=nested), load=[nested / "declared.py"]) as two:
            (found,) = compare.compare(two, [case], setup, compare.Plan(1, 1))
        assert (found.a.status, found.b.status) == ("wrong", "failed")
        assert "which lacks vendored/inner. Run git submodule update --init --recursive." in found.b.reason
    finally:
        OPERATIONS.clear()
        OPERATIONS.update(before)
    listed = subprocess.run(["git", "worktree", "list"], cwd=nested, capture_output=True, text=True, check=True).stdout
    assert listed.count("\n") == 1 and (nested / ".git" / "config").read_text() in (config, config.partition("[submodule")[0])
