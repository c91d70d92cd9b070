"""Tells the splits of a data set apart by name: train and validation in one folder are two
datasets."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from pathlib import PurePosixPath

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_SPLIT_OF = {word: split for split, words in _SPLITS.items() for word in words}
_TOKENS = re.compile(r"[^-_. ]+")


def split_of(name: str) -> str | None:
    """Return `train`, `validation` or `test` if a part of a name says so: of `in1k-val-00.tar`
    it does, of `valley.tar` it does not."""
    found = _find_split(name)
    return None if found is None else found[0]


def _find_split(name: str) -> tuple[str, int] | None:
    """Return the split that a name says, and the place behind that word."""
    for token in _TOKENS.finditer(name.lower()):
        # train2017 and val0001 as COCO and others write them.
        split = _SPLIT_OF.get(token[0].rstrip("0123456789"))
        if split is not None:
            return split, token.end()
    return None


def pattern_per_split(names: Iterable[str]) -> dict[str, str]:
    """Return what to type for the files of each split; empty if there are not several.

    Args:
        names: File names in one folder.

    Returns:
        For example `{"train": "x-train-*.tar", "validation": "x-val-*.tar"}`.
    """
    files: dict[str, list[str]] = {}
    everything = sorted(names)
    for name in everything:
        split = split_of(PurePosixPath(name).stem)
        if split is not None:
            files.setdefault(split, []).append(name)
    # Files that name no split do not make several: `train-0.tar` beside `extra-0.tar`.
    if len(files) < 2:
        return {}
    return {split: _pattern(found, everything) for split, found in sorted(files.items())}


def _pattern(names: list[str], everything: list[str]) -> str:
    """Return a pattern that matches these names and none of the others; a list if none does."""
    first = PurePosixPath(names[0])
    prefix = _common_start(names).rstrip("0123456789")
    if len(names) == 1:
        found = _find_split(first.stem)
        end = len(first.stem) if found is None else found[1]
        # train.tar is the whole split; of train-00000-of-00007 others may come.
        prefix = first.stem[: end + 1] if end < len(first.stem) else ""
    pattern = f"{prefix}*{first.suffix}"
    matched = [name for name in everything if fnmatch.fnmatchcase(name, pattern)]
    return pattern if prefix and matched == names else ",".join(names)


def _common_start(names: list[str]) -> str:
    first = min(names)
    last = max(names)
    length = next((i for i, char in enumerate(first) if last[i : i + 1] != char), len(first))
    return first[:length]
