"""Counts what was bad and why, names the first hundred, and stops a run that has too much of it."""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pipeline import storage
from pipeline.config import LoaderConfig
from pipeline.errors import DataError
from pipeline.images.refused import Refused

_WINDOW = 10_000
# In `data_report.json` and in every checkpoint: enough to see a pattern, small enough to keep.
_KEPT = 100
_DEFAULTS = LoaderConfig()


class DataReport:
    """Count of good and bad samples; thread-safe.

    Args:
        max_bad_share: Share of bad samples among the last 10,000 above which `DataError` is raised.
            Fewer seen so far count as if the rest had been good: one bad sample among the first ten
            is no reason to stop.
        max_bad_in_a_row: Consecutive bad samples at which `DataError` is raised.
    """

    def __init__(
        self,
        *,
        max_bad_share: float = _DEFAULTS.max_bad_share,
        max_bad_in_a_row: int = _DEFAULTS.max_bad_in_a_row,
    ) -> None:
        self._max_bad = max_bad_share * _WINDOW
        self._max_in_a_row = max_bad_in_a_row
        # The decode thread counts; the training loop reads the report when it saves.
        self._lock = threading.Lock()
        self._num_seen = 0
        self._in_a_row = 0
        self._recent: deque[int] = (
            deque()
        )  # positions of the bad samples among the last 10,000
        self._reasons: Counter[str] = Counter()
        self._shards: Counter[str] = Counter()
        self._first: list[dict[str, str]] = []

    @property
    def num_seen(self) -> int:
        """Return how many samples were recorded."""
        return self._num_seen

    @property
    def num_bad(self) -> int:
        """Return how many of them were bad."""
        return self._reasons.total()

    def good(self, count: int = 1) -> None:
        """Record samples that were decoded."""
        if count:
            with self._lock:
                self._num_seen += count
                self._in_a_row = 0

    def bad(self, refused: Refused, shard: str, key: str) -> None:
        """Record one sample that was replaced.

        Raises:
            DataError: One of the two limits is passed.
        """
        self.record([refused], [shard], [key])

    def record(
        self,
        refused: Sequence[Refused | None],
        shards: Sequence[str],
        keys: Sequence[str],
    ) -> None:
        """Record samples in order; None means that a sample is good.

        Raises:
            DataError: One of the two limits is passed; every sample given has been counted.
        """
        problem = ""
        with self._lock:
            for why, shard, key in zip(refused, shards, keys, strict=True):
                self._num_seen += 1
                if why is None:
                    self._in_a_row = 0
                    continue
                self._count(why, shard, key)
                problem = problem or self._passed_limit()
        # Raised once all are counted, so that a report written after it is whole.
        if problem:
            raise DataError(problem)

    def _count(self, refused: Refused, shard: str, key: str) -> None:
        self._in_a_row += 1
        # Only bad positions are kept: a good sample, the usual case, costs no memory.
        self._recent.append(self._num_seen)
        while self._recent[0] <= self._num_seen - _WINDOW:
            self._recent.popleft()
        self._reasons[str(refused.reason)] += 1
        self._shards[shard] += 1
        # With what is known of this one; the counter above goes by the bare reason.
        if len(self._first) < _KEPT:
            entry = {"shard": shard, "key": key, "reason": str(refused)}
            self._first.append(entry)

    def _passed_limit(self) -> str:
        if self._in_a_row >= self._max_in_a_row:
            found = (
                f"{self._in_a_row} bad samples in a row (limit {self._max_in_a_row})"
            )
        elif len(self._recent) > self._max_bad:
            count = f"{len(self._recent)} bad samples"
            found = f"{count} among the last {_WINDOW:,} (limit {self._max_bad:g})"
        else:
            return ""
        reasons = _most_common(self._reasons)
        shards = _most_common(self._shards)
        return (
            f"data: {found}, {self._reasons.total()} of {self._num_seen} in all. Reasons: "
            f"{reasons}. Shards: {shards}. Check them with pipeline.verify --full; "
            "loader.max_bad_share and loader.max_bad_in_a_row set the limits."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the counts and the first hundred bad samples."""
        with self._lock:
            return {
                "num_seen": self._num_seen,
                "num_bad": self._reasons.total(),
                "reasons": dict(self._reasons.most_common()),
                "shards": dict(self._shards.most_common(_KEPT)),
                "first": list(self._first),
            }

    def write(self, uri: str) -> None:
        """Write the report as JSON."""
        report = self.to_json()
        text = json.dumps(report, indent=1, ensure_ascii=False)
        storage.write_atomic(uri, text.encode() + b"\n")


def _most_common(counter: Counter[str]) -> str:
    counts = []
    for name, count in counter.most_common(3):
        counts.append(f"{name} ({count})")
    return ", ".join(counts)


def merge_reports(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Add up the reports of several ranks, or of one run before and after a stop.

    Args:
        reports: As `DataReport.to_json` gives them.

    Returns:
        One report of the same form; the first hundred bad samples are those of the reports in turn.
    """
    reasons: Counter[str] = Counter()
    shards: Counter[str] = Counter()
    for report in reports:
        reasons.update(report["reasons"])
        shards.update(report["shards"])
    # In turn, so that no rank's list hides another's.
    unique: dict[tuple[str, str, str], dict[str, str]] = {}
    first_of_reports = [report["first"] for report in reports]
    for row in zip_longest(*first_of_reports):
        for entry in row:
            # None fills up the shorter lists.
            if entry is None:
                continue
            # A bad sample comes again in each epoch; naming it once leaves room for others.
            identity = (entry["shard"], entry["key"], entry["reason"])
            unique[identity] = entry
    num_seen = sum(report["num_seen"] for report in reports)
    num_bad = sum(report["num_bad"] for report in reports)
    return {
        "num_seen": num_seen,
        "num_bad": num_bad,
        "reasons": dict(reasons.most_common()),
        "shards": dict(shards.most_common(_KEPT)),
        "first": list(unique.values())[:_KEPT],
    }
