"""Output that cannot be written: no command ends in a traceback for it, and no work stops."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from pipeline.console import guard, say, say_json, say_result
from pipeline.console.streams import _Tolerant, refuse_lost_result
from pipeline.errors import InfrastructureError
from tests.unit.test_doors import DOORS, QUICK, REPOSITORY

FAULTS = {
    "none": {},
    "stdout closed": {1: "closed"},
    "stderr closed": {2: "closed"},
    "stdin closed": {0: "closed"},
    "all closed": {0: "closed", 1: "closed", 2: "closed"},
    "stdout full": {1: "full"},
    "stderr full": {2: "full"},
    "both full": {1: "full", 2: "full"},
    "stdout dead": {1: "dead"},
    "stderr dead": {2: "dead"},
    "both dead": {1: "dead", 2: "dead"},
}
"""What stands at each descriptor; the others are files."""
OF_STDOUT = ("stdout closed", "stdout full", "stdout dead", "all closed")
OF_STDERR = ("stderr closed", "stderr full", "stderr dead", "all closed")
WHILE_WORKING = (
    "none",
    "all closed",
    "both full",
    "both dead",
    "stdout full",
    "stdout dead",
)
SERVER = """
    import importlib, io, json, os, signal, sys
    cases, folder = json.load(open(sys.argv[1])), sys.argv[2]
    import matplotlib, PIL.Image, pyarrow.parquet, tyro
    from pipeline import console
    for module in {case["module"] for case in cases}:
        importlib.import_module(module)

    def place(descriptor, what, name):
        if what == "closed":
            os.close(descriptor)
            return
        if what == "dead":
            reader, writer = os.pipe()
            os.close(reader)
        elif what == "full":
            writer = os.open("/dev/full", os.O_RDWR)
        else:
            writer = os.open(name, os.O_RDWR | os.O_CREAT)
        os.dup2(writer, descriptor)
        os.close(writer)

    def stream(descriptor, mode):
        # As the interpreter makes them when it starts.
        try:
            raw = io.FileIO(descriptor, mode, closefd=False)
        except OSError:
            return None
        below = io.BufferedWriter(raw) if mode == "w" else io.BufferedReader(raw)
        return io.TextIOWrapper(below, "utf-8", line_buffering=descriptor == 2)

    codes = []
    for number, case in enumerate(cases):
        child = os.fork()
        if not child:
            try:
                for descriptor in (0, 1, 2):
                    what = case["at"].get(str(descriptor), "file")
                    place(descriptor, what, f"{folder}/{number}-{descriptor}")
                sys.stdin = sys.__stdin__ = stream(0, "r")
                sys.stdout = sys.__stdout__ = stream(1, "w")
                sys.stderr = sys.__stderr__ = stream(2, "w")
                sys.argv = case["words"]
                code = 0
                try:
                    console.start_command(case["module"])
                except SystemExit as end:
                    code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
                # What the interpreter does at its end, which makes 120 out of a failure.
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            except BaseException as error:
                os.write(9, repr(error).encode())
                os._exit(99)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    json.dump(codes, open(f"{folder}/codes.json", "w"))
"""
"""Imports all doors once, and forks a child per case whose streams it prepares."""


def module_of(door: str) -> str:
    folder = REPOSITORY / door.replace(".", "/")
    return f"{door}.__main__" if folder.is_dir() else door


def run_cases(cases: list[dict[str, object]], folder: Path) -> list[int]:
    """Run commands with prepared streams, each in a process of its own, and give their codes."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    with (folder / "9").open("wb") as trouble:
        os.set_inheritable(trouble.fileno(), True)
        code = f"import os; os.dup2({trouble.fileno()}, 9)\n" + textwrap.dedent(SERVER)
        done = subprocess.run(
            [sys.executable, "-c", code, str(folder / "cases.json"), str(folder)],
            cwd=REPOSITORY,
            pass_fds=[trouble.fileno()],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert (folder / "9").read_text() == ""
    codes: list[int] = json.loads((folder / "codes.json").read_text())
    return codes


def written(folder: Path, number: int, descriptor: int) -> str:
    path = folder / f"{number}-{descriptor}"
    return path.read_text(errors="replace") if path.exists() else ""


def test_no_door_ends_in_a_traceback(tmp_path: Path) -> None:
    """Whatever happens to its streams, a command ends with the code that it has otherwise."""
    cases = [
        {"module": module_of(door), "words": [door, word], "at": FAULTS[fault]}
        for door in QUICK
        for word, faults in (("--help", OF_STDOUT), ("--no-such-option", OF_STDERR))
        for fault in faults
    ]
    folder = tmp_path / "out"
    codes = run_cases(cases, folder)
    assert len(DOORS) >= len(QUICK) >= 10
    for number, (case, code) in enumerate(zip(cases, codes, strict=True)):
        expected = 0 if "--help" in case["words"] else 2  # type: ignore[operator]
        # The help of train.pretrain is its own text, not tyro's: its loss is told.
        if case["module"] == "train.pretrain" and case["at"] == FAULTS["stdout full"]:
            expected = expected or 76
        assert code == expected, (case, written(folder, number, 2))
        for descriptor in (1, 2):
            assert "Traceback" not in written(folder, number, descriptor), case


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20 + number, 16), name.encode()[0]).save(
                folder / name / f"{number}.jpg"
            )
    return folder


@pytest.mark.slow
def test_a_conversion_is_finished_whoever_listens(
    pictures: Path, tmp_path: Path
) -> None:
    """Its code is the work's; only a JSON that is lost changes it."""
    module = "pipeline.convert.__main__"
    cases = [
        {
            "module": module,
            "words": [
                "convert",
                str(pictures),
                str(tmp_path / f"{name}{flag}"),
                "--workers=1",
                *flag.split(),
            ],
            "at": FAULTS[name],
        }
        for name in WHILE_WORKING
        for flag in ("", " --json")
    ]
    codes = run_cases(cases, tmp_path / "out")
    for number, (case, code) in enumerate(zip(cases, codes, strict=True)):
        target = Path(case["words"][2])  # type: ignore[index]
        assert json.loads((target / "dataset.json").read_text())["num_samples"] == 6, (
            case
        )
        loses = "--json" in case["words"] and 1 in case["at"]  # type: ignore[operator]
        assert code == (76 if loses else 0), case
        told = written(tmp_path / "out", number, 2)
        assert ("could not be written to stdout" in told) == (
            loses and 2 not in case["at"]
        ), case  # type: ignore[operator]


@pytest.mark.slow
def test_what_a_check_has_found_goes_before_a_lost_answer(
    pictures: Path, tmp_path: Path
) -> None:
    target = tmp_path / "made"
    words = ["convert", str(pictures), str(target), "--workers=1"]
    cases: list[dict[str, object]] = [
        {"module": "pipeline.convert.__main__", "words": words, "at": {}}
    ]
    for uri in (target, tmp_path / "none"):
        cases += [
            {
                "module": "pipeline.verify",
                "words": ["verify", str(uri), "--json"],
                "at": at,
            }
            for at in map(FAULTS.__getitem__, WHILE_WORKING)
        ]
    codes = run_cases(cases, tmp_path / "out")[1:]
    lost = [76 if 1 in FAULTS[name] else 0 for name in WHILE_WORKING]
    assert codes == [*lost, *([3] * len(WHILE_WORKING))]


def test_a_real_shell_agrees(tmp_path: Path) -> None:
    """The interpreter's own start with closed streams, in place of our imitation of it."""
    script = """
        "$1" -m pipeline.verify /none 2>&- ; echo $?
        "$1" -m pipeline.verify /none --json 2>err >&- ; echo $?; cat err
        "$1" -m pipeline.inspect --help <&- 2>&- | true; echo ${PIPESTATUS[0]}
    """
    done = subprocess.run(
        ["bash", "-c", textwrap.dedent(script), "bash", sys.executable],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "3\n3\n0\n", done.stdout
    assert done.stderr == ""


# ------------------------------------------------------------------------------------ one stream
def test_a_stream_writes_all_or_drops_it_and_goes_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    raw = _Tolerant(writer)
    # More than a pipe holds: the reader takes it while the writer waits.
    text = os.urandom(300_000)
    got = bytearray()
    child = os.fork()
    if not child:
        os.close(reader)
        raw.write(text)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        got += file.read()
    os.waitpid(child, 0)
    assert got == text

    with (tmp_path / "file").open("w+b") as file:
        full = os.open("/dev/full", os.O_WRONLY)
        kept = os.dup(file.fileno())
        raw = _Tolerant(full)
        assert raw.write(b"lost") == 4
        assert raw.trouble is not None
        # Room again: what comes then is written.
        os.dup2(kept, full)
        assert raw.write(b"kept") == 4
        assert (tmp_path / "file").read_bytes() == b"kept"


@pytest.mark.parametrize("kind", ["none", "closed", "raises"])
def test_what_stands_in_the_place_of_a_stream_may_be_broken(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    stream: io.StringIO | None = None if kind == "none" else Broken()
    if kind == "closed" and stream is not None:
        stream.close()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    say("a line")
    say_json({"a": 1})
    with pytest.raises(InfrastructureError, match="could not be written to stdout"):
        refuse_lost_result()
    say_result("a line")
    lost = (
        contextlib.nullcontext()
        if kind == "none"
        else pytest.raises(InfrastructureError)
    )
    with lost:
        refuse_lost_result()
    refuse_lost_result()  # told once


def test_a_name_that_is_not_text_is_written_all_the_same(tmp_path: Path) -> None:
    code = r"""
        import sys
        from pipeline.console import outlive_readers, say, say_json
        outlive_readers()
        say_json({"name": b"caf\xe9.jpg".decode(errors="surrogateescape")})
        say(b"caf\xe9.jpg".decode(errors="surrogateescape"))
    """
    for encoding in ("utf-8", "ascii"):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["name"] == "caf\udce9.jpg"


def test_too_many_open_files_anywhere_are_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In a library that raises them as they come, as a failed import, or as a cause."""
    exhausted = OSError(errno.EMFILE, "Too many open files")
    wrapped = RuntimeError("cannot go on")
    wrapped.__cause__ = exhausted
    library = ImportError(
        "libx.so: cannot open shared object file: Too many open files"
    )
    for error in (exhausted, wrapped, library):

        def command(error: BaseException = error) -> int:
            raise error

        assert guard(command, interrupted="") == 76
        told = capfd.readouterr().err
        assert told.startswith("error: too many open files")
        assert "ulimit -n" in told
    assert guard(lambda: Path("/none").stat().st_size, interrupted="") == 1
    assert "Traceback" in capfd.readouterr().err
