"""What all benchmarks share: turns, spreads, probes, tables, one command line, two checkouts."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.bench.against import Checkouts
from pipeline.bench.command import BenchArguments, Outcome, report, run_bench
from pipeline.bench.probes import cpu_s, machine, peak_rss_bytes, rss_bytes, run_counted
from pipeline.bench.rows import rows_table, to_json
from pipeline.bench.turns import Spread, Turns, divide_pairs, time_call
from pipeline.errors import ConfigError, InfrastructureError

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = st.floats(min_value=1e-3, max_value=1e3)


# ------------------------------------------------------------------------------------ turns


def test_everybody_goes_first_as_often_and_the_warm_up_does_not_count():
    calls = []

    def turn(name):
        calls.append(name)
        return {"n": len(calls)}

    turns = Turns("test", rounds=6, warm_up_rounds=3)
    for _ in turns.rounds():
        turns.take(
            {
                name: lambda name=name: calls.append(name) or {"n": len(calls)}
                for name in "abc"
            }
        )
    firsts = calls[::3]
    assert all(firsts.count(name) == 3 for name in "abc")
    assert turns.subjects == ["a", "b", "c"]
    # Nine calls were the warm-up's.
    assert [min(turns.values(name, "n")) > 9 for name in "abc"] == [True] * 3
    assert [len(turns.values(name, "n")) for name in "abc"] == [6] * 3


def test_a_subject_that_fails_keeps_the_figures_it_had():
    turns = Turns("test", rounds=3)
    left = [{"n": 1.0}, {}, {}]
    for _ in turns.rounds():
        turns.take({"fails": lambda: left.pop(0), "goes on": lambda: {"n": 2.0}})
    assert turns.values("fails", "n") == [1.0]
    assert turns.ratio("goes on", "fails", "n") == Spread(2.0, 2.0, 2.0)
    assert turns.values("unknown", "n") == []
    assert turns.subjects == ["fails", "goes on"]


def test_rounds_say_how_long_they_will_take(capsys):
    for _ in Turns("name", rounds=1, warm_up_rounds=1).rounds():
        pass
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("name: round 1 of 2 (to warm up, not counted), about ")
    assert second == "name: round 2 of 2, about 0 s left"


@given(st.lists(FIGURES, min_size=1, max_size=9), FIGURES)
def test_ratios_of_pairs_do_not_see_what_slows_a_whole_round(values, factor):
    noise = [1.0 + index for index in range(len(values))]
    slowed = [value * n for value, n in zip(values, noise, strict=True)]
    others = [value * n * factor for value, n in zip(values, noise, strict=True)]
    ratio = divide_pairs(others, slowed)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)


# ------------------------------------------------------------------------------------- rows


def test_tables_and_json_come_from_the_same_rows():
    rows = [
        {"what": "a", "step_s": Spread(1.5, 1.0, 12345.0), "rate_per_s": 123.456},
        {"what": "b", "problem": "out of memory"},
    ]
    assert rows_table(rows).splitlines() == [
        "| what | step_s | rate_per_s | problem |",
        "|---|---|---|---|",
        "| a | 1.5 (1-12,345) | 123.5 |  |",
        "| b |  |  | out of memory |",
    ]
    plain = {"what": "a", "step_s": 1.5, "step_min_s": 1.0, "step_max_s": 12345.0}
    assert to_json(rows[0]) == {**plain, "rate_per_s": 123.456}
    assert list(to_json({"median_s": Spread(2, 1, 3)})) == [
        "median_s",
        "min_s",
        "max_s",
    ]
    assert list(to_json({"ratio": Spread(2, 1, 3)})) == [
        "ratio",
        "min_ratio",
        "max_ratio",
    ]
    outcome = report(
        rows, ratios={"a / b": Spread(2.0, 1.0, 3.0)}, facts={"files": 3, "deep": {}}
    )
    assert outcome.data["ratios"] == {"a / b": 2.0}
    assert "| a / b | 2 (1-3) |" in outcome.text
    assert outcome.text.endswith("files 3.")


# ----------------------------------------------------------------------------------- probes

BURN = """
    import time
    def burn(seconds):
        start = time.process_time()
        while time.process_time() - start < seconds:
            pass
"""


def script(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(BURN) + textwrap.dedent(code))
    return [sys.executable, str(path)]


def test_the_cpu_time_of_workers_behind_a_fork_server_is_counted(tmp_path):
    command = script(
        tmp_path,
        """
        import multiprocessing
        if __name__ == "__main__":
            with multiprocessing.get_context("forkserver").Pool(2) as pool:
                pool.map(burn, [0.4, 0.4], chunksize=1)
                pool.close()
                pool.join()
        """,
    )
    figures = run_counted(command)
    assert figures["cpu_s"] > 0.8
    assert figures["peak_mib"] > 1


def test_cpu_time_of_a_command_is_its_own(tmp_path):
    # A child of this process that is no part of the command: neither counted nor waited for.
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        figures = run_counted(script(tmp_path, "burn(0.3)"))
        assert other.poll() is None
    finally:
        other.communicate(b"\n")
    assert figures["cpu_s"] > 0.3
    with pytest.raises(InfrastructureError, match=r"ended with code 3: nobody listens"):
        run_counted(
            script(
                tmp_path,
                "import sys; print('nobody listens', file=sys.stderr); sys.exit(3)",
            )
        )


def test_cpu_time_counts_children_alive_and_ended(tmp_path):
    before_s = cpu_s()
    subprocess.run(script(tmp_path, "burn(0.3)"), check=True)
    assert cpu_s() - before_s > 0.3
    command = script(tmp_path, "burn(0.3); print('done', flush=True); input()")
    before_s = cpu_s()
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    # The clock of the process table has ticks of 10 ms.
    alive_s = cpu_s() - before_s
    child.communicate(b"\n")
    assert alive_s > 0.28


def test_memory_and_machine_are_known():
    assert peak_rss_bytes() > 0
    assert rss_bytes() > 2**20
    about = machine()
    assert about["cpu"]
    assert {about["avx512"], about["bf16"]} <= {"yes", "no"}
    assert about["cores"] >= 1
    flags = Path("/proc/cpuinfo").read_text()
    assert (about["avx512"] == "yes") == ("avx512f" in flags)


def test_the_harness_loads_no_torch():
    modules = ("against", "command", "probes", "rows", "turns")
    imports = "; ".join(f"import pipeline.bench.{name}" for name in modules)
    code = f"import sys; {imports}; assert not {{'torch', 'cv2', 'pyarrow'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_a_timed_call_gives_wall_and_cpu_seconds():
    figures = time_call(lambda: sum(range(10**6)))
    assert figures["wall_s"] > 0
    assert figures["cpu_s"] > 0


# ---------------------------------------------------------------------------- command line


@dataclass(frozen=True)
class Arguments(BenchArguments):
    """Test."""

    size: int = 1
    """Size."""


def test_one_command_line_for_all(capsys):
    def measure(arguments: Arguments) -> Outcome:
        if arguments.size < 0:
            raise ConfigError("size must not be negative")
        if not arguments.size:
            raise KeyboardInterrupt
        return report([{"size": arguments.size}])

    def run(*words: str) -> int:
        return run_bench(
            Arguments, measure, module="pipeline.test", args=words, stopped="Look out."
        )

    assert run("--size", "3", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == [{"size": 3}]
    assert "commit" in result["machine"]
    assert run("--size", "3") == 0
    assert "| 3 |" in capsys.readouterr().out
    assert run("--size", "-1") == 2
    assert run("--size", "0") == 130
    assert "test: stopped, no figures. Look out." in capsys.readouterr().err


# --------------------------------------------------------------------------- two checkouts


def make_checkout(root: Path, body: str) -> Path:
    """Make a checkout whose command `pipeline.speed` prints what the body says."""
    (root / "pipeline").mkdir(parents=True)
    (root / "pipeline" / "__init__.py").write_text("")
    (root / "pipeline" / "speed.py").write_text(textwrap.dedent(body))
    return root


NEW = """
    import json, sys
    words = sys.argv[1:]
    if words != ["data", "--seconds", "2", "--json"]:
        sys.exit(2)
    rows = [{"case": "a", "step_s": 2.0, "step_min_s": 1.0, "rates_per_s": [5.0, 10.0, 20.0]}]
    print(json.dumps({"machine": {"load_s": 1.0}, "num_images": 5, "zero_s": 0.0, "rows": rows}))
"""
OLD = """
    import json, sys
    words = sys.argv[1:]
    if words != ["data", "--seconds", "2", "--json", "on"]:
        sys.exit(2)
    print(json.dumps([{"step_s": 1.0, "step_min_s": 1.0, "rates_per_s": 5.0, "zero_s": 1.0}]))
"""


def test_two_checkouts_are_compared_in_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "pipeline.bench.against._HERE", make_checkout(tmp_path / "new", NEW)
    )
    other = make_checkout(tmp_path / "old", OLD)
    words = [
        "data",
        "--against",
        str(other),
        "--seconds",
        "2",
        "--against-rounds=2",
        "--json",
    ]
    # A working folder that is a checkout too: its packages must not be found first.
    monkeypatch.chdir(make_checkout(tmp_path / "wrong", "raise SystemExit(9)"))
    checkouts = Checkouts(other, "pipeline.speed", words)
    rows = checkouts.compare(rounds=2)
    slowdowns = {row["figure"]: row["slowdown"].median for row in rows}
    assert slowdowns == {"0.step_s": 2.0, "0.rates_per_s": 0.5}
    facts = checkouts.facts(rows)
    assert (facts["worst_figure"], facts["worst_slowdown"]) == ("0.step_s", 2.0)


def test_a_comparison_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="holds no pipeline"):
        Checkouts(tmp_path, "pipeline.speed", [])
    monkeypatch.setattr(
        "pipeline.bench.against._HERE", make_checkout(tmp_path / "new", NEW)
    )
    broken = make_checkout(tmp_path / "broken", "raise SystemExit('no GPU')")
    words = ["data", "--seconds", "2"]
    with pytest.raises(InfrastructureError, match=r"broken ended with code 1: no GPU"):
        Checkouts(broken, "pipeline.speed", words).compare(rounds=1)
    silent = make_checkout(tmp_path / "silent", "print('{}')")
    with pytest.raises(ConfigError, match="no figure is in the results of both"):
        Checkouts(silent, "pipeline.speed", words).compare(rounds=1)
    with pytest.raises(ConfigError, match="ended with code 2"):
        Checkouts(silent, "pipeline.speed", ["--unknown"]).compare(rounds=1)
