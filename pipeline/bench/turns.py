"""Measure several subjects in turns, so that a busy minute of the machine falls on all of them.

Words of all benchmarks here: a *subject* is one thing that is measured (a loader, a command, a
way to read); a *turn* measures one subject once; a *round* is one turn of every subject; a
*figure* is a number that a turn gives, such as `wall_s`.

Loads no torch: every benchmark imports this before its own subjects.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pipeline.bench.probes import cpu_s
from pipeline.console import say

Figures = Mapping[str, float]
"""What one turn gives, by name of the figure. Empty when the subject has failed."""
Measure = Callable[[], Figures]
"""Takes one turn of a subject."""
Call = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of several values, and how far they reach.

    Args:
        median: the middle.
        low: the smallest value.
        high: the largest value.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise values; there must be at least one."""
        # The median, because a mean follows the one turn in which the machine was busy.
        middle = median(values)
        low = min(values)
        high = max(values)
        return cls(middle, low, high)

    def text(self, form: str = ".2f", *, scale: float = 1.0) -> str:
        """Write `median (low-high)`.

        Args:
            form: format of each number, such as ".3f".
            scale: factor on each number, such as 1e3 to write seconds as milliseconds.
        """
        middle = format(scale * self.median, form)
        low = format(scale * self.low, form)
        high = format(scale * self.high, form)
        return f"{middle} ({low}-{high})"


def divide_pairs(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Compare two subjects round by round: the ratios of values of the same round.

    Ratios of pairs are steadier than a ratio of medians: what slows a whole round cancels out.
    A subject that ended early has fewer values; the rounds that both have are compared.
    """
    pairs = zip(values, others, strict=False)
    ratios = [value / other for value, other in pairs]
    return Spread.of(ratios)


class Turns:
    """Take turns, and keep the figures of the rounds that count.

    Args:
        label: Name of the benchmark, in front of what it tells a person.
        rounds: Rounds that count.
        warm_up_rounds: Rounds before them that do not.
    """

    def __init__(self, label: str, *, rounds: int, warm_up_rounds: int = 0) -> None:
        self._label = label
        self._num_rounds = rounds
        self._num_warm_up = warm_up_rounds
        self._round = 0
        # By subject, then by figure: a value for each round that counted.
        self._figures: dict[str, dict[str, list[float]]] = defaultdict(
            lambda: defaultdict(list)
        )

    @property
    def subjects(self) -> list[str]:
        """Subjects that have figures, in the order in which they were given."""
        named = self._figures.items()
        return [name for name, figures in named if figures]

    def rounds(self) -> Iterator[int]:
        """Count the rounds, those of the warm-up too, and say how long the others will take."""
        total = self._num_warm_up + self._num_rounds
        start_s = time.monotonic()
        for self._round in range(total):
            yield self._round
            done = self._round + 1
            passed_s = time.monotonic() - start_s
            round_s = passed_s / done
            num_left = total - done
            left_s = round_s * num_left
            note = ""
            if self._round < self._num_warm_up:
                note = " (to warm up, not counted)"
            progress = f"round {done} of {total}{note}"
            say(f"{self._label}: {progress}, about {left_s:,.0f} s left")

    def take(self, subjects: Mapping[str, Measure]) -> None:
        """Measure subjects one after the other. Who goes first changes from round to round.

        Args:
            subjects: by name, what takes one turn and returns its figures.
        """
        names = list(subjects)
        if not names:
            return
        # Tables keep the order in which subjects are given, whoever goes first.
        for name in names:
            self._figures[name].update()
        # Who goes second finds the caches of the first, and a processor that is warm.
        first = self._round % len(names)
        in_turn = names[first:] + names[:first]
        for name in in_turn:
            figures = subjects[name]()
            self.record(name, figures)

    def take_timed(self, calls: Mapping[str, Call]) -> None:
        """Measure calls as `take` does; their figures are `wall_s` and `cpu_s`."""

        def timed(call: Call) -> Measure:
            return lambda: time_call(call)

        subjects = {name: timed(call) for name, call in calls.items()}
        self.take(subjects)

    def record(self, subject: str, figures: Figures) -> None:
        """Keep the figures of one turn, unless this round is to warm up."""
        if self._round < self._num_warm_up:
            return
        kept = self._figures[subject]
        for figure, value in figures.items():
            kept[figure].append(value)

    def figures(self, subject: str) -> list[str]:
        """Name the figures of a subject."""
        figures = self._figures.get(subject, {})
        return list(figures)

    def values(self, subject: str, figure: str) -> list[float]:
        """Return a figure of a subject, one value per round; empty if there is none."""
        # Not by [], which would make a row for a subject that was never measured.
        figures = self._figures.get(subject, {})
        return figures.get(figure, [])

    def spread(self, subject: str, figure: str) -> Spread:
        """Summarise a figure of a subject over the rounds."""
        values = self.values(subject, figure)
        return Spread.of(values)

    def ratio(self, subject: str, other: str, figure: str) -> Spread:
        """Divide a figure of a subject by another subject's, round by round."""
        values = self.values(subject, figure)
        others = self.values(other, figure)
        return divide_pairs(values, others)


def time_call(call: Call) -> Figures:
    """Call once; return `wall_s`, and `cpu_s` of this process and its children."""
    # The probe walks the process table: outside of the wall time.
    before_s = cpu_s()
    start_s = time.perf_counter()
    call()
    wall_s = time.perf_counter() - start_s
    used_s = cpu_s() - before_s
    return {"wall_s": wall_s, "cpu_s": used_s}
