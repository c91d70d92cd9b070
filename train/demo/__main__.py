"""From pictures to a trained, measured and exported model in minutes:
`python -m train.demo [--src FOLDER] [--uri URI] [--run-dir runs/demo]`.

Pictures become shards, a small model is trained by the real commands, stopped on purpose and
resumed, measured on held-out pictures and exported. Every command is printed as one would type it.
Run it again, and it goes on where it was.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("train.demo.__main__")

from collections.abc import Sequence

from pipeline.console import run_command
from train.demo.stages import Arguments, run_demo


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_command(
        run_demo,
        Arguments,
        argv,
        module="train.demo",
        interrupted="\ndemo: stopped. The same command goes on from here.",
    )
