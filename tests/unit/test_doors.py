"""Every command of the house: --help, --json, Ctrl-C while it starts, and what stdout carries."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import console
from pipeline.errors import DataError, InfrastructureError
from tests.limits import HANG_S

REPOSITORY = Path(__file__).resolve().parents[2]
GUARDS = ("return run_command(", "return guard(", "return run_bench(")
"""`run_bench` goes through `run_command`: tests/unit/test_bench_harness.py."""
LOADS_TORCH = {"pipeline.bench", "train.step_bench", "train.checkpoint_bench"}
"""Commands that measure torch: their --help may load it."""
NO_JSON = {"train.pretrain"}
"""It leaves status.json and metrics.jsonl; --help and --dry-run are text."""


def find_doors() -> list[str]:
    """List the commands: files at the root of a room that define `main`, and `__main__` files."""
    doors = []
    for room in ("pipeline", "train"):
        for path in sorted((REPOSITORY / room).glob("*.py")):
            tree = ast.parse(path.read_text())
            functions = {
                node.name for node in tree.body if isinstance(node, ast.FunctionDef)
            }
            if "main" in functions:
                doors.append(f"{room}.{path.stem}")
        doors += [
            f"{room}.{path.parent.name}"
            for path in (REPOSITORY / room).glob("*/__main__.py")
        ]
    return sorted(doors)


DOORS = find_doors()
QUICK = [name for name in DOORS if name not in LOADS_TORCH]


def file_of(door: str) -> Path:
    path = REPOSITORY / door.replace(".", "/")
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def run_door(
    door: str,
    *words: str,
    at_import: str = "",
    action: str = "pass",
    first: str = "pass",
    folder: Path,
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, in an interpreter that does something when a module is
    imported.

    Args:
        door: the command.
        words: what stands behind it.
        at_import: modules, by spaces; the import of the first is waited for.
        action: Python that is then executed.
        first: Python that is executed when the interpreter starts.
        folder: where the interpreter finds its instructions.
    """
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(f"""
        import os, signal, sys

        class Watch:
            def find_spec(self, name, path=None, target=None):
                if name in {at_import.split()!r}:
                    {action}

        {first}
        sys.meta_path.insert(0, Watch())
        """)
    )
    path = os.pathsep.join([str(folder), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-m", door, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )


def test_every_command_is_found() -> None:
    named = {"pipeline.verify", "pipeline.convert", "train.pretrain", "train.demo"}
    assert named < set(DOORS)
    assert len(DOORS) >= 14


@pytest.mark.parametrize("door", DOORS)
def test_a_door_guards_its_imports_first_and_then_its_body(door: str) -> None:
    tree = ast.parse(file_of(door).read_text())
    first, rest = tree.body[:3], tree.body[3:]
    assert ast.unparse(first[2]).startswith("if __name__ == '__main__':"), (
        "before the imports"
    )
    assert "start_command(" in ast.unparse(first[2])
    main = next(
        node
        for node in rest
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    returned = ast.unparse(main.body[-1])
    assert returned.startswith(GUARDS), returned


Runs = dict[str, subprocess.CompletedProcess[str]]


def run_all(
    doors: list[str], *words: str, action: str, at_import: str, folder: Path
) -> Runs:
    """Run commands several at a time: most of their life is imports."""

    def run(door: str) -> subprocess.CompletedProcess[str]:
        place = folder / door
        place.mkdir()
        return run_door(door, *words, at_import=at_import, action=action, folder=place)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(doors, pool.map(run, doors), strict=True))


def check_help(door: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert f"python -m {door}" in done.stdout or f"{door} RECIPE" in done.stdout
    # A flag: no value behind it and no --no-json beside it.
    assert ("--json" in done.stdout) == (door not in NO_JSON)
    assert "--no-json" not in done.stdout
    assert "--json {" not in done.stdout


@pytest.fixture(scope="module")
def helps(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What --help prints where an import of torch would end the process with a code of its own."""
    folder = tmp_path_factory.mktemp("helps")
    return run_all(
        QUICK, "--help", at_import="torch", action="os._exit(99)", folder=folder
    )


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """What Ctrl-C leaves when it comes with the first import that takes long."""
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    folder = tmp_path_factory.mktemp("interrupted")
    return run_all(DOORS, at_import="numpy pydantic tyro", action=kill, folder=folder)


@pytest.mark.parametrize("door", QUICK)
def test_help_needs_no_torch_and_json_is_a_flag(door: str, helps: Runs) -> None:
    check_help(door, helps[door])


@pytest.mark.slow
@pytest.mark.parametrize("door", sorted(LOADS_TORCH))
def test_help_of_what_measures_torch(door: str, tmp_path: Path) -> None:
    check_help(door, run_door(door, "--help", folder=tmp_path))


@pytest.mark.parametrize("door", DOORS)
def test_ctrl_c_during_the_imports_ends_in_one_line(
    door: str, interrupted: Runs
) -> None:
    done = interrupted[door]
    line = f"{door}: stopped before it began. Nothing was changed; run it again.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)


@pytest.mark.parametrize(
    "words",
    [
        ("train.evaluate", "nowhere"),
        ("train.export", "nowhere", "--to", "mae"),
        ("train.reconstruct", "nowhere"),
        ("train.pretrain", "demo", "--data.train", "nowhere"),
    ],
)
def test_ctrl_c_while_torch_is_imported_ends_in_one_line(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    done = run_door(*words, at_import="torch", action=kill, folder=tmp_path)
    line = f"{words[0]}: stopped before it began. Nothing was changed; run it again.\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
    assert not (tmp_path / "runs").exists()


def test_of_many_ranks_one_reports_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    kill = "os.kill(os.getpid(), signal.SIGINT)"
    done = run_door(
        "train.pretrain", at_import="pydantic", action=kill, folder=tmp_path
    )
    assert (done.returncode, done.stderr) == (130, "")


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """As under nohup, or in the background of a script."""
    done = run_door(
        "pipeline.verify",
        str(tmp_path / "none"),
        at_import="numpy",
        action="os.kill(os.getpid(), signal.SIGINT)",
        first="signal.signal(signal.SIGINT, signal.SIG_IGN)",
        folder=tmp_path,
    )
    assert done.returncode == DataError.exit_code, done.stderr
    assert done.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["model.py", "model/__init__.py"])
def test_a_file_that_hides_a_package_is_named_and_not_run(
    name: str, tmp_path: Path
) -> None:
    hiding = tmp_path / name
    hiding.parent.mkdir(exist_ok=True)
    hiding.write_text("open('was-run', 'w')")
    done = run_door("train.pretrain", "demo", "--dry-run", folder=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {hiding} hides our package model")
    assert not (tmp_path / "was-run").exists()
    # The other commands do not need it.
    assert run_door("pipeline.verify", "--help", folder=tmp_path).returncode == 0


def test_a_folder_of_data_hides_nothing(tmp_path: Path) -> None:
    for name in ("model", "train", "pipeline"):
        (tmp_path / name).mkdir()
    done = run_door("train.pretrain", "demo", "--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------- the guard


def test_errors_end_with_their_codes_and_without_secrets(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fails(error: BaseException) -> int:
        def command() -> int:
            raise error

        return console.guard(command, interrupted="stopped; go on")

    uri = "s3://key:secret@bucket/data?X-Amz-Signature=secret"
    assert fails(InfrastructureError(f"{uri}: gone")) == 76
    assert fails(ValueError(f"{uri}: a defect")) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "error: s3://" in err
    assert "Traceback" in err  # of the defect
    assert "secret" not in err

    assert fails(KeyboardInterrupt()) == 130
    assert capfd.readouterr().err == "stopped; go on\n"


def test_the_guard_is_silent_where_another_rank_speaks(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def command() -> int:
        raise DataError("gone")

    assert console.guard(command, interrupted="", speaks=False) == 3
    assert capfd.readouterr().err == ""


def test_ctrl_c_in_the_body_is_an_exception_again() -> None:
    """What is at work must get the chance to put its things away."""
    code = """
        import os, signal, sys
        from dataclasses import dataclass
        from pipeline import console

        @dataclass(frozen=True)
        class Arguments:
            \"\"\"Nothing to give.\"\"\"

        def body(arguments):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(100): pass
            finally:
                sys.stderr.write("put away\\n")
            return 0

        def main():
            return console.run_command(
                body, Arguments, [], module="m", interrupted="stopped; go on"
            )

        sys.modules["door"] = sys.modules["__main__"]
        console.start_command("door")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "put away\nstopped; go on\n")


def test_stdout_carries_the_result_alone() -> None:
    """Neither libraries that print, nor child processes, nor C code come before the object."""
    code = """
        import os, subprocess, sys
        from dataclasses import dataclass
        from pipeline import console

        @dataclass(frozen=True)
        class Arguments:
            \"\"\"One flag.\"\"\"
            json: bool = False

        def body(arguments):
            print("from a library")
            os.write(1, b"from C\\n")
            subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
            console.say_json({"answer": 42})
            print("after it")
            return 0

        code = console.run_command(body, Arguments, ["--json"], module="m", interrupted="")
        print("and stdout is back")
        sys.exit(code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result, _, rest = done.stdout.rpartition("and stdout is back\n")
    assert json.loads(result) == {"answer": 42}
    assert rest == ""
    for line in ("from a library", "from C", "from a child", "after it"):
        assert line in done.stderr


def test_quick_work_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Progress("Reading", total=3, after_s=3600.0) as progress:
        progress.advance(3)
    assert capsys.readouterr().err == ""
    with console.Progress("Reading", total=3) as progress:
        progress.advance(3)
    assert capsys.readouterr().err.startswith("Reading: 3 of 3 images, ")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
