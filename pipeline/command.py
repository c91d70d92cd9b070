"""What every command line here shares: errors in one paragraph on stderr, and the exit code that says which kind."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from pipeline.errors import MaelstromError
from pipeline.uri import redact

EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def say(text: str) -> None:
    """Write a line for a person, to stderr: stdout is kept for what a program reads."""
    sys.stderr.write(f"{redact(text)}\n")
    sys.stderr.flush()


def say_json(data: dict[str, Any]) -> None:
    """Write one JSON object for a program, to stdout."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def run_command(command: Callable[[], int], *, interrupted: str) -> int:
    """Run a command's body and return its exit code.

    Args:
        command: Returns the exit code where nothing goes wrong.
        interrupted: What to tell after Ctrl-C.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    try:
        return command()
    except MaelstromError as error:
        say(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(interrupted)
        return EXIT_INTERRUPTED
