"""Measure reading from storage: `python -m pipeline.storage_bench [--uri s3://bucket/dataset]`.

Everything is compared with what plain clients do with the same bytes in the same run, in turns, so
that the figures of a busy or a slow machine still say something. Without `--uri` it makes a
dataset, serves it on loopback and stops the store at the end.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.storage_bench")

import sys
from collections.abc import Sequence

from pipeline.bench.storage import Arguments, measure
from pipeline.console import run_command, say_json
from pipeline.errors import ConfigError


def _run(arguments: Arguments) -> int:
    if arguments.uri and not arguments.uri.startswith("s3://"):
        raise ConfigError(
            f"storage_bench: --uri {arguments.uri!r}: the plain clients read s3:// only"
        )
    if min(arguments.runs, arguments.num_shards, arguments.streams, arguments.batch_size) < 1:
        raise ConfigError(
            "storage_bench: --runs, --num-shards, --streams and --batch-size are at least 1"
        )
    result = measure(arguments)
    if arguments.json:
        say_json(result)
        return 0
    write = sys.stdout.write
    write(f"{result['num_bytes'] / 1e6:,.0f} MB in shards, {arguments.runs} runs\n\n")
    write("| what | median s | min | max | MB/s |\n|---|---|---|---|---|\n")
    for row in result["rows"]:
        rate = f"{row['mb_per_s']:,.0f}" if row["mb_per_s"] else ""
        write(
            f"| {row['what']} | {row['median_s']:.3f} | {row['min_s']:.3f} | {row['max_s']:.3f} | "
            f"{rate} |\n"
        )
    write("\n| ratio | |\n|---|---|\n")
    for name, value in result["ratios"].items():
        write(f"| {name} | {value:.2f} |\n")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.storage_bench",
        interrupted="storage_bench: stopped.",
    )
