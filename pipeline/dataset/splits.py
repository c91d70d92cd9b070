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
    if found is None:
        return None
    split, _ = found
    return split


def _find_split(name: str) -> tuple[str, int] | None:
    """Return the split that a name says, and the place behind that word."""
    lower = name.lower()
    for token in _TOKENS.finditer(lower):
        # train2017 and val0001 as COCO and others write them.
        word = token[0].rstrip("0123456789")
        split = _SPLIT_OF.get(word)
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
        stem = PurePosixPath(name).stem
        split = split_of(stem)
        if split is not None:
            of_split = files.setdefault(split, [])
            of_split.append(name)
    # Files that name no split do not make several: `train-0.tar` beside `extra-0.tar`.
    if len(files) < 2:
        return {}
    patterns = {}
    for split in sorted(files):
        patterns[split] = _pattern(files[split], everything)
    return patterns


def _pattern(names: list[str], everything: list[str]) -> str:
    """Return a pattern that matches these names and none of the others; a list if none does."""
    first = PurePosixPath(names[0])
    # Without digits: `train-000*` would miss a hundredth shard that is added later.
    start = _common_start(names)
    prefix = start.rstrip("0123456789")
    if len(names) == 1:
        stem = first.stem
        found = _find_split(stem)
        end = len(stem)
        if found is not None:
            _, end = found
        # train.tar is the whole split; of train-00000-of-00007 others may come.
        prefix = ""
        if end < len(stem):
            prefix = stem[: end + 1]
    pattern = f"{prefix}*{first.suffix}"
    matched = [name for name in everything if fnmatch.fnmatchcase(name, pattern)]
    if prefix and matched == names:
        return pattern
    return ",".join(names)


def _common_start(names: list[str]) -> str:
    first = min(names)
    last = max(names)
    # What the first and the last in sorted order share, all in between share too.
    length = 0
    for char, other in zip(first, last, strict=False):
        if char != other:
            break
        length += 1
    return first[:length]
