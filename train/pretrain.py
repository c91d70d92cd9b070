"""Pre-train a masked autoencoder: the entry, and the loop in one straight line.

Runs under `deepspeed --module`, torchrun, srun, or plain `python -m train.pretrain RECIPE`.
Settings are read and checked before torch is imported.

Shapes: B images, C channels, H height, W width, N patches.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    import os

    from pipeline.console import start_command
    from train.process.place import rank_of

    start_command("train.pretrain", speaks=rank_of(os.environ) == 0)

import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from pipeline.console import guard, say_result
from pipeline.errors import ConfigError
from train.config import RunConfig
from train.process.folder import named_run_dir, prepare_folder
from train.process.outcome import INTERRUPTED, Outcome
from train.process.place import is_launched, rank_of, ranks_of_node, stale_problems
from train.process.starting import Start, end_now
from train.settings.command_line import HelpRequested, parse_command
from train.settings.lengths import known_num_samples, refuse_lengths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: words after the program's name; the process's own by default.

    Returns:
        The exit code: 0 done, 2 configuration, 3 data, 4 checkpoint, 5 numerics, 75 preempted and
        saved, 76 infrastructure, 130 stopped by Ctrl-C before training began, 1 a defect.
    """
    words = sys.argv[1:] if argv is None else argv
    # Every rank finds the same mistakes; one of them says so.
    is_main = rank_of(os.environ) == 0
    return guard(
        lambda: _run(words),
        interrupted=f"pretrain: {INTERRUPTED}",
        speaks=is_main,
    )


def _run(words: Sequence[str]) -> int:
    try:
        command = parse_command(words)
    except HelpRequested as help_text:
        say_result(str(help_text))
        return 0
    except ConfigError as error:
        return _refuse(words, error)
    if command.action == "dry-run":
        return _dry_run(command.config)
    if problems := stale_problems(os.environ):
        return _refuse(words, ConfigError("\n".join(problems)))
    return run(command.config)


def _refuse(words: Sequence[str], error: ConfigError) -> int:
    """Report mistakes in the settings, in status.json too: launchers do not pass the code on."""
    run_dir = named_run_dir(words, is_launched=is_launched(os.environ))
    if run_dir is None or "--dry-run" in words:
        raise error
    outcome = Outcome(run_dir)
    outcome.roll.sign()
    return outcome.refuse(error)


def run(config: RunConfig) -> int:
    """Train as the settings say and report how it ended.

    Args:
        config: checked settings.

    Returns:
        The exit code.
    """
    outcome = Outcome(Path(config.run_dir))
    start = Start(outcome)
    try:
        with start.watching():
            share_cores(os.environ)
            # While it costs two seconds and no GPU: what only the data's size can tell.
            if (num_samples := known_num_samples(config)) is not None:
                refuse_lengths(config, num_samples=num_samples)
            # Seconds of imports, and not one file touched yet.
            from train.loop.loop import train

            start.imported()
            prepare_folder(outcome.run_dir)
            train(config, outcome)
            outcome.finish()
    except BaseException as error:  # noqa: BLE001 - whatever it was, the run folder must say so
        end_now(outcome.conclude(error))
    return 0


def share_cores(env: MutableMapping[str, str]) -> None:
    """Divide this node's cores among its ranks, before torch starts its threads; what is set
    already stays.

    Every rank would otherwise start a thread a core, and threads of OpenMP that wait by spinning
    take the cores from the decoder's: on two busy cores a step took eight times as long.

    Args:
        env: the environment to change.
    """
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // ranks_of_node(env))
    env.setdefault("OMP_NUM_THREADS", str(threads))
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _dry_run(config: RunConfig) -> int:
    """Print what a run would be, as TOML that `--config` reads."""
    from train.settings.size import describe_size
    from train.settings.text import to_toml

    if rank_of(os.environ) == 0:
        notes = [f"# {line}\n" for line in describe_size(config)]
        say_result(to_toml(config) + "\n" + "".join(notes))
    return 0
