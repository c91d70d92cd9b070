"""What the command lines of all benchmarks share: `--json`, tables, Ctrl-C, exit codes.

Loads no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.bench.against import Checkouts
from pipeline.bench.probes import machine
from pipeline.bench.rows import Row, rows_table, to_json
from pipeline.bench.turns import Spread
from pipeline.console import run_command, say_json, say_result
from pipeline.options import LocalPath, Rounds


@dataclass(frozen=True)
class BenchArguments:
    """Options that every benchmark has."""

    json: bool = False
    """Write the result to stdout as JSON instead of tables."""
    against: LocalPath | None = None
    """Another checkout of this repository, for example of the commit before: run its command and
    this one in turns, and compare every figure."""
    against_rounds: Rounds = 5
    """--against: rounds."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a benchmark has to say.

    Args:
        data: for `--json`; the machine is added unless it is there.
        text: for a person.
    """

    data: dict[str, Any]
    text: str


def report(
    rows: Sequence[Row],
    *,
    ratios: Mapping[str, Spread] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Outcome:
    """Make the tables and the JSON of a benchmark out of the same rows.

    Args:
        rows: what was measured, with the same columns in each.
        ratios: what follows from them, by name.
        facts: what holds for all rows.
    """
    about = dict(facts or {})
    json_rows = [to_json(row) for row in rows]
    data = {**about, "rows": json_rows}
    blocks = [rows_table(rows)]
    if ratios:
        # Medians for programs, spreads for a person, who must see whether a difference is one.
        medians = {}
        ratio_rows = []
        for name, ratio in ratios.items():
            medians[name] = ratio.median
            ratio_rows.append({"ratio": name, "": ratio})
        data["ratios"] = medians
        blocks.append(rows_table(ratio_rows))
    # Nested facts, such as all settings, are for programs.
    plain = []
    for fact, value in about.items():
        if not isinstance(value, dict):
            plain.append(f"{fact} {value}")
    if plain:
        blocks.append(f"{', '.join(plain)}.")
    return Outcome(data, "\n\n".join(blocks))


A = TypeVar("A", bound=BenchArguments)


def run_bench(
    kind: type[A],
    measure: Callable[[A], Outcome],
    *,
    module: str,
    args: Sequence[str] | None,
    stopped: str = "",
) -> int:
    """Run the command line of a benchmark and return its exit code.

    Args:
        kind: its arguments.
        measure: measures what they say.
        module: the command, such as "pipeline.bench".
        args: words of the command line; None for the process's own.
        stopped: what to tell after Ctrl-C besides that it stopped.
    """
    # Kept as they were typed: `--against` hands them to another checkout, whose options may differ.
    if args is None:
        args = sys.argv[1:]
    words = list(args)

    def body(arguments: A) -> int:
        if arguments.against is None:
            outcome = measure(arguments)
        else:
            checkouts = Checkouts(arguments.against, module, words)
            rows = checkouts.compare(rounds=arguments.against_rounds)
            outcome = report(rows, facts=checkouts.facts(rows))
        if arguments.json:
            # A benchmark that knows more of the machine has a "machine" of its own, which wins.
            say_json({"machine": machine(), **outcome.data})
        else:
            say_result(f"{outcome.text}\n")
        return 0

    name = module.rpartition(".")[2]
    interrupted = f"{name}: stopped, no figures. {stopped or 'Run it again.'}"
    return run_command(body, kind, args, module=module, interrupted=interrupted)
