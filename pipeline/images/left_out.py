"""What a source holds and a dataset does not: counted by reason, with names to look for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

LEFT_OUT_FILE = "left_out.json"
"""Report beside a converted dataset; written only if anything was left out."""
_MOST_NAMED = 1000
"""Names kept per reason: a million captions would fill memory, their count does not."""


@dataclass
class LeftOut:
    """Files that were seen and are not stored.

    Args:
        counts: How many, by reason: an ending such as `.txt`, or a short text.
        names: The first of them, by reason.
        notes: What a person must know besides, one sentence each: for example class folders that
            hold no image, which are not files and do not count.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return self.counts.total()

    def __bool__(self) -> bool:
        return bool(self.counts) or bool(self.notes)

    def add(self, reason: str, name: str) -> None:
        """Count one file."""
        self.counts[reason] += 1
        named = self.names.setdefault(reason, [])
        if len(named) < _MOST_NAMED:
            named.append(printable(name))

    def count(self, counts: Mapping[str, int]) -> None:
        """Count files whose names are not known, such as the members of a shard."""
        self.counts.update(counts)

    def update(self, other: LeftOut) -> None:
        """Add what another part of the same source left out."""
        self.counts.update(other.counts)
        self.notes.extend(other.notes)
        for reason, names in other.names.items():
            named = self.names.setdefault(reason, [])
            named.extend(names[: _MOST_NAMED - len(named)])

    def say(self) -> str:
        """Return the counts in words, the most frequent first: `3 .txt, 1 hidden`."""
        return ", ".join(
            f"{count:,} {reason}" for reason, count in self.counts.most_common()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the report's part on what was left out."""
        return {
            "left_out": dict(self.counts.most_common()),
            # Sorted: storage lists in any order, and the report should be the same for the same
            # source.
            "names": {
                reason: sorted(names) for reason, names in sorted(self.names.items())
            },
            "notes": self.notes,
        }


def parse_left_out(text: bytes) -> LeftOut:
    """Read a report back; one that cannot be read counts as empty."""
    try:
        data = json.loads(text)
        counts = Counter(
            {str(reason): int(count) for reason, count in data["left_out"].items()}
        )
        return LeftOut(
            counts,
            dict(data["names"]),
            list(data["notes"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return LeftOut()


def printable(name: str) -> str:
    """Return a name that any terminal and any file can take: on one line, in valid UTF-8."""
    # A byte that is not UTF-8 stands in the name as a surrogate, which cannot be written.
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in name
    )
