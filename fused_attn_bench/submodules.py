"""Submodules of a commit, checked out in its worktree from what the repository has of them: git leaves their folders empty there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fused_attn_bench.project import git


def check_out(root: Path, tree: Path) -> list[str]:
    """Those of a tree and of its submodules, without network; what is not there stays an empty folder.

    Args:
        root: a checkout of the repository, whose own submodules are taken.
        tree: a worktree of it.

    Returns:
        Paths of those that could not be checked out, below the tree.
    """
    return _check_out((root / git(root, "rev-parse", "--git-common-dir")).resolve(), tree, root)


def _check_out(kept: Path, tree: Path, root: Path) -> list[str]:
    """Of a repository whose own things git keeps in a folder, and which may be checked out at ``root``."""
    if not (tree / ".gitmodules").is_file():
        return []
    absent, names = [], _names(tree)
    for entry in filter(None, git(tree, "ls-tree", "-r", "-z", "HEAD").split("\0")):
        about, path = entry.split("\t", 1)
        mode, _, commit = about.split()
        if mode != "160000":  # what git calls an entry that is a commit
            continue
        source = _source((kept / "modules" / names.get(path, path), root / path / ".git"), commit)
        if source is None:
            absent.append(path)
            continue
        # Objects are shared, not copied; a clone of a local path asks no server, whatever the submodule's own address is.
        git(tree, "clone", "--quiet", "--shared", "--no-checkout", "--", str(source), path)
        git(tree / path, "checkout", "--quiet", "--detach", commit)
        absent += [f"{path}/{inner}" for inner in _check_out(source, tree / path, root / path)]
    return absent


def _names(tree: Path) -> dict[str, str]:
    """Each path's name, under which git keeps a submodule."""
    listed = git(tree, "config", "--file", ".gitmodules", "--null", "--list").split("\0")
    pairs = (re.fullmatch(r"submodule\.(.+)\.path\n(.+)", line, re.DOTALL) for line in listed)
    return {found[2]: found[1] for found in pairs if found}


def _source(places: Sequence[Path], commit: str) -> Path | None:
    """The first of git's folders that has a commit."""
    for place in places:
        try:
            # The folder where such a submodule was checked out last may be gone, which git minds unless it is told another.
            git(place if place.is_dir() else place.parent, f"--git-dir={place}", "--work-tree=.", "cat-file", "-e", f"{commit}^{{commit}}")
        except ValueError:
            continue
        return place
    return None
