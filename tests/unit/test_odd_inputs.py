"""What a user gives is used, refused or named: options without a use, patterns without quotes, what
a temporary copy leaves behind."""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.convert.__main__ import main
from pipeline.dataset import unpacked as unpacked_module
from pipeline.dataset.unpacked import unpacked
from pipeline.inspect import main as inspect_main
from pipeline.sources.names import sample_keys
from pipeline.verify import main as verify_main

DAY_S = 86_400


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("tmp")))


def picture(red: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (red, 90, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sources(folder: Path) -> dict[str, Path]:
    """Make a source of every kind."""
    flat = folder / "flat"
    flat.mkdir()
    (flat / "a.jpg").write_bytes(picture())
    (folder / "list.csv").write_text("path,label,other\nflat/a.jpg,1,2\n")
    table = pa.table({"image": [picture()], "label": [1], "other": [2]})
    pq.write_table(table, folder / "x.parquet")
    return {
        "folder": flat,
        "tar": pack(folder / "loose.tar", {"a.jpg": picture(), "b.jpg": picture(1)}),
        "dataset": pack(folder / "s.tar", {"a.jpg": picture(), "a.cls": b"1"}),
        "list": folder / "list.csv",
        "parquet": folder / "x.parquet",
    }


# ------------------------------------------------------------------------- options without a use


@pytest.mark.parametrize("kind", ["folder", "tar", "dataset", "list", "parquet"])
def test_an_option_is_used_or_refused(tmp_path, capsys, kind):
    source = sources(tmp_path)[kind]
    is_table = kind in ("list", "parquet")
    image = "path" if kind == "list" else "image"
    (tmp_path / "truth.txt").write_text("1\n")
    expected = {
        ("--label-column", "other"): is_table,
        ("--image-column", image): is_table,
        ("--image-component", "jpg"): kind == "dataset",
        (
            "--synsets",
            str(tmp_path / "truth.txt"),
        ): False,  # explains a ground truth: there is none
    }
    for number, (option, is_used) in enumerate(expected.items()):
        target = str(tmp_path / f"out-{number}")
        code = main([str(source), target, "--workers", "1", *option])
        said = capsys.readouterr().err
        assert code == (0 if is_used else 2), (option, said)
        assert is_used or option[0] in said
        assert is_used or not Path(target).exists()


def test_a_dataset_keeps_its_labels_and_says_so(tmp_path, capsys):
    (tmp_path / "truth.txt").write_text("1\n")
    source = sources(tmp_path)["dataset"]
    options = ["--ground-truth", str(tmp_path / "truth.txt")]
    assert main([str(source), str(tmp_path / "out"), "--workers", "1", *options]) == 2
    assert "--ground-truth" in capsys.readouterr().err


# ------------------------------------------------------------------------ patterns without quotes


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (main, ["a-0.tar", "a-1.tar", "out"]),
        (main, ["--workers", "2", "a-0.tar", "a-1.tar", "a-2.tar", "out", "--dry-run"]),
        (main, ["a.csv", "--strict", "b.csv", "--split=x", "out"]),
        (verify_main, ["a-0.tar", "a-1.tar"]),
        (verify_main, ["--full", "a-0.tar", "a-1.tar", "--json"]),
        (inspect_main, ["a-0.tar", "a-1.tar"]),
    ],
)
def test_a_pattern_that_the_shell_expanded_is_refused(
    tmp_path, monkeypatch, capsys, command, words
):
    monkeypatch.chdir(tmp_path)
    assert command(words) == 2
    said = capsys.readouterr().err
    assert "in quotes" in said
    assert f"got {sum('.' in word or word == 'out' for word in words)} words" in said
    assert list(tmp_path.iterdir()) == []


def test_values_of_options_are_not_surplus(tmp_path):
    source = sources(tmp_path)["folder"]
    words = [
        "--workers",
        "1",
        str(source),
        "--split",
        "x",
        str(tmp_path / "out"),
        "--quality=80",
    ]
    assert main(words) == 0


# ---------------------------------------------------------------------------- what is left out


@pytest.mark.parametrize(
    "text", [b"[1, 2]", b"3", b"null", b'"x"', b"{bad", b"", b"\xff"]
)
@pytest.mark.parametrize("cls", [{}, {"a.cls": b"1"}])
def test_json_that_is_not_an_object_is_counted(tmp_path, capsys, text, cls):
    members = {
        "a.jpg": picture(),
        "a.json": text,
        **cls,
        "b.jpg": picture(),
        "b.json": b"{}",
    }
    pack(tmp_path / "src/x.tar", members)
    assert (
        main([str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1", "--json"])
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert said["left_out"] == {"JSON that is not an object": 1}
    assert said["num_seen"] == 3


def test_verify_names_the_folders_that_it_saw(tmp_path, capsys):
    for name in ["cat", "dog", ".git"]:
        (tmp_path / name).mkdir()
    assert verify_main([str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert "2 folders (cat, dog)" in said
    assert "pipeline.convert" in said


def test_addresses_of_rows_that_cannot_be_one_cost_only_their_row(tmp_path, capsys):
    sources(tmp_path)
    # A good remote row among them: bad ones must not stop it either.
    storage.write_atomic("memory://rows/a.jpg", picture())
    rows = ["https:///x.jpg", "https://", "https://[bad/x.jpg", "https://h:99999/x.jpg"]
    rows += ["http://x/y.jpg", "s3:///x.jpg", "S3://"]
    num_bad = len(rows)
    rows += ["flat/a.jpg", "memory://rows/a.jpg"]
    (tmp_path / "l.csv").write_text("\n".join(["path", *rows]))
    words = [str(tmp_path / "l.csv"), str(tmp_path / "out"), "--workers", "1", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["num_samples"] == 2
    assert said["rejected"] == {"not a valid path or URL": num_bad}


def test_a_value_that_is_too_long_is_not_a_quotation_mark(tmp_path, capsys):
    (tmp_path / "l.csv").write_text(f"path,label\na.jpg,{'x' * 140_000}\n")
    assert main([str(tmp_path / "l.csv"), str(tmp_path / "out"), "--workers", "1"]) == 3
    assert "more than 131,072 characters" in capsys.readouterr().err


def test_only_what_is_there_is_advised(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    for number in range(4):
        (tmp_path / f"src/{number}.jpg").write_bytes(picture())
    pq.write_table(
        pa.table({"file_name": ["0.jpg"]}), tmp_path / "src/metadata.parquet"
    )
    assert main([str(tmp_path / "src"), str(tmp_path / "out"), "--workers", "1"]) == 2
    said = capsys.readouterr().err
    assert "*.parquet'" in said
    assert "*.tar" not in said


# --------------------------------------------------------------------------- temporary copies


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.tar"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_no_advice_names_a_temporary_folder(tmp_path, capsys, caplog, name, is_folder):
    shard = pack(tmp_path / "x", {"a.jpg": picture(), "a.cls": b"1"})
    packed = tmp_path / "src" / name
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    source = packed.parent if is_folder else packed
    assert main([str(source), str(tmp_path / "out"), "--workers", "1"]) == 0
    said = capsys.readouterr().err + caplog.text
    assert "--write-manifest" not in said


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("data", [b"", b"x" * 600, gzip.compress(b"y" * 600)])
def test_errors_name_the_source_and_not_its_copy(tmp_path, capsys, data, is_folder):
    packed = tmp_path / "src/x.tar.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(data))
    source = packed.parent if is_folder else packed
    code = main([str(source), str(tmp_path / "out"), "--workers", "1"])
    said = capsys.readouterr().err
    assert code in (2, 3)
    error = said[said.index("error: ") :]
    assert str(source) in error
    assert "maelstrom-unpacked" not in error
    assert "SRC DST" not in error


@pytest.mark.parametrize("name", ["a.jpg.gz", "list.csv.gz", "t.parquet.GZ"])
def test_other_packed_files_say_how_to_unpack(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    assert main([str(tmp_path / name), str(tmp_path / "out"), "--workers", "1"]) == 2
    assert "gunzip" in capsys.readouterr().err


def test_copies_of_dead_processes_are_removed_and_others_stay(tmp_path):
    temporary = Path(tempfile.gettempdir())
    stale, held, new, other = (
        temporary / f"{prefix}{name}"
        for prefix, name in (
            ("maelstrom-unpacked-", "stale"),
            ("maelstrom-unpacked-", "held"),
            ("maelstrom-unpacked-", "new"),
            ("somebody-", "else"),
        )
    )
    outside = tmp_path / "outside"
    for folder in (stale, held, new, other, outside):
        (folder / "files").mkdir(parents=True)
        (folder / "files/x.tar").write_bytes(b"x")
    link = temporary / "maelstrom-unpacked-link"
    link.symlink_to(outside)
    for folder in (stale, held, other, outside):
        os.utime(folder, (0, folder.stat().st_mtime - DAY_S))
    lock = os.open(held, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        shard = pack(tmp_path / "x.tar", {"a.jpg": picture()})
        packed = tmp_path / "x.tar.gz"
        packed.write_bytes(gzip.compress(shard.read_bytes()))
        with unpacked(str(packed)) as copy:
            own = Path(copy).parent.parent
            # A conversion of days holds its own, however old it is.
            os.utime(own, (0, own.stat().st_mtime - DAY_S))
            unpacked_module._remove_stale(temporary)
            assert Path(copy).exists()
        assert not own.exists()
    finally:
        os.close(lock)
    left = sorted(path.name for path in temporary.iterdir())
    assert left == sorted(path.name for path in (held, new, other, link))
    assert (outside / "files/x.tar").exists()


# -------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["x.jp g", "x.png"], ["x-jp_g", "x-png"]),
        (["x.a\tb", "x.a b"], ["x-a_b-0", "x-a_b-1"]),
        (["x.JPG", "x.png"], ["x-jpg", "x-png"]),
        (["x", "x.jpg"], ["x", "x-jpg"]),
        (["a\u00a0", "a."], ["a_", "a"]),
        (["d.x/a", "d.x/a.b"], ["d_x/a", "d_x/a-b"]),
    ],
)
def test_endings_of_files_make_fit_keys(names, keys):
    assert sample_keys(pa.array(names)).to_pylist() == keys
