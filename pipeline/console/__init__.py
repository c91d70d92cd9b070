"""What every command line here shares: how it starts, errors in one paragraph on stderr, exit
codes that say which kind, Ctrl-C, `--json`, progress, and output that nobody reads."""

from pipeline.console.command import (
    EXIT_INTERRUPTED,
    EXIT_UNEXPECTED,
    guard,
    run_command,
    start_command,
    starting,
)
from pipeline.console.progress import Progress
from pipeline.console.streams import outlive_readers, say, say_json, say_result

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_UNEXPECTED",
    "Progress",
    "guard",
    "outlive_readers",
    "run_command",
    "say",
    "say_json",
    "say_result",
    "start_command",
    "starting",
]
