"""Compare this checkout with another one: the same command in both, in turns.

For example `python -m pipeline.bench DATASET --against ../before`: each round starts the command
of either checkout once, and the ratios are taken round by round. The other checkout's command may
be older than this option; only its `--json` is read.

Loads no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench.probes import commit_of
from pipeline.bench.rows import Row
from pipeline.bench.turns import Figures, Spread, Turns, divide_pairs
from pipeline.errors import ConfigError, InfrastructureError, MaelstromError

_HERE = Path(__file__).resolve().parents[2]
_THIS, _OTHER = "this", "other"
_HIGHER_IS_BETTER = ("_per_s", "tflops", "mfu")
_LOWER_IS_BETTER = ("_s", "_ms", "_per_image", "_mib", "_gib")
_SKIPPED = ("settings", "stages", "ratios", "ratio", "machine")
"""Parts of a result that are no figures, or that depend on how long the measurement was."""
_EXTREMES = ("min_s", "max_s")
_JSON_WORDS = (("--json",), ("--json", "on"))
"""How the commands were asked for JSON, newest first: `--json on` until every one had a flag."""
_USAGE_ERROR = 2


class Checkouts:
    """A command in this checkout and in another.

    Args:
        other: root of the other checkout; its `.venv` is used if there is one.
        module: the command, such as "pipeline.bench".
        words: its command line, which both must understand.

    Raises:
        ConfigError: there is no checkout.
    """

    def __init__(self, other: Path, module: str, words: Sequence[str]) -> None:
        if not (other / "pipeline" / "__init__.py").is_file():
            raise ConfigError(
                f"--against {other}: holds no pipeline/__init__.py. Give the root of a checkout, "
                "made for example with: git worktree add ../before HEAD~1"
            )
        plain = _without_own_options(words)
        self._other_root = other.resolve()
        self._module = module
        typed = " ".join(plain)
        self._title = f"{module} {typed}"
        self._this = _Checkout(_HERE, module, plain)
        self._other = _Checkout(self._other_root, module, plain)

    def compare(self, *, rounds: int) -> list[Row]:
        """Run both in turns, and compare every figure that both give.

        Args:
            rounds: rounds that count; one more before them warms the page cache.

        Returns:
            Rows of `figure`, `this`, `other` and `slowdown`: by how much this checkout is worse,
            round by round; 1 is equal and below 1 better, whichever way the figure counts.

        Raises:
            ConfigError: the command line is wrong in either, or no figure is in both.
            InfrastructureError: either failed.
        """
        turns = Turns(f"{self._module} --against", rounds=rounds, warm_up_rounds=1)
        subjects = {_THIS: self._this.measure, _OTHER: self._other.measure}
        for _ in turns.rounds():
            turns.take(subjects)
        rows: list[Row] = []
        for figure in turns.figures(_THIS):
            mine = turns.values(_THIS, figure)
            theirs = turns.values(_OTHER, figure)
            # Zero stands for "not measured" in every benchmark, and a ratio of it says little.
            if not theirs or 0 in (*mine, *theirs):
                continue
            # One sense for all figures: above 1 this checkout is worse.
            if figure.endswith(_HIGHER_IS_BETTER):
                worse = divide_pairs(theirs, mine)
            else:
                worse = divide_pairs(mine, theirs)
            row = {
                "figure": figure,
                "this": Spread.of(mine),
                "other": Spread.of(theirs),
                "slowdown": worse,
            }
            rows.append(row)
        if not rows:
            raise ConfigError(
                "--against: no figure is in the results of both checkouts"
            )
        return rows

    def facts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return what was compared, and the figure that lost most."""
        worst = max(rows, key=lambda row: row["slowdown"].median)
        return {
            "command": self._title,
            "this_commit": commit_of(_HERE),
            "other_commit": commit_of(self._other_root),
            "worst_figure": worst["figure"],
            "worst_slowdown": worst["slowdown"].median,
        }


class _Checkout:
    """A command in one checkout, in a process of its own for each turn."""

    def __init__(self, root: Path, module: str, words: Sequence[str]) -> None:
        # Its own packages if it has them: a change of versions is a part of what is compared.
        python = root / ".venv" / "bin" / "python"
        interpreter = sys.executable
        if python.exists():
            interpreter = str(python)
        self._command = [interpreter, "-m", module, *words]
        self._title = f"{module} of {root}"
        self._json_words = list(_JSON_WORDS)
        # The working folder stays the user's, for paths on the command line are relative to it.
        # Safe path: or `-m` would find the packages of the working folder first.
        environment = {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
        self._environment = {**os.environ, **environment}

    def measure(self) -> Figures:
        """Run the command once and return the figures of its JSON."""
        done = self._run()
        # An older command line asks for JSON in another way: found out on the first turn.
        while done.returncode == _USAGE_ERROR and len(self._json_words) > 1:
            del self._json_words[0]
            done = self._run()
        if done.returncode:
            said = done.stderr.strip()[-800:]
            kind: type[MaelstromError] = InfrastructureError
            if done.returncode == _USAGE_ERROR:
                kind = ConfigError
            raise kind(f"{self._title} ended with code {done.returncode}: {said}")
        result = json.loads(done.stdout)
        return dict(_figures(result))

    def _run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self._command, *self._json_words[0]],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )


def _without_own_options(words: Sequence[str]) -> list[str]:
    """Drop what an older command does not know, and `--json`, which is added for either."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        name, has_value, _ = word.partition("=")
        if name in ("--against", "--against-rounds", "--against_rounds"):
            if not has_value:
                next(rest, None)
        elif name != "--json":
            kept.append(word)
    return kept


def _figures(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Walk through a result and yield its figures by path, such as "2.cpu_ms_per_image"."""
    name = path.rpartition(".")[2]
    if isinstance(value, dict):
        for key, inner in value.items():
            # Older commands print a bare list of rows.
            skipped = key in _SKIPPED or key.endswith(_EXTREMES)
            if not skipped:
                inner_path = path
                if key != "rows":
                    inner_path = f"{path}.{key}".strip(".")
                yield from _figures(inner, inner_path)
    elif isinstance(value, list):
        numbers = []
        for one in value:
            if isinstance(one, (int, float)):
                numbers.append(one)
        if numbers and len(numbers) == len(value):
            yield from _figures(median(numbers), path)
        else:
            for index, inner in enumerate(value):
                inner_path = f"{path}.{index}"
                yield from _figures(inner, inner_path.strip("."))
    elif isinstance(value, (int, float)) and name.endswith(
        _HIGHER_IS_BETTER + _LOWER_IS_BETTER
    ):
        yield path, float(value)
