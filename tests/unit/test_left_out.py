"""What a conversion does not store is told: by reason, with names, and so that the sum is right."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.convert.__main__ import main
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.errors import DataError
from pipeline.storage import is_hidden


def picture(side: int = 12, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (side, 90, 30)).save(buffer, kind)
    return buffer.getvalue()


PICTURE = picture()


def run(source: Path | str, target: Path, *options: str) -> dict:
    """Convert, and return what `--json` says."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout", printed)
        code = main([str(source), str(target), "--workers", "1", "--json", *options])
    assert code == 0
    return json.loads(printed.getvalue())


NAMES = {
    "x.jpg": "stored",
    "y.JPEG": "stored",
    "bad.png": "rejected",
    "zero.jpg": "rejected",
    "a.bmp": "rejected",
    "note.txt": ".txt",
    "x.json": ".json",
    "README": "no extension",
    "photo.jpg ": "blank at the end of the name",
    "photo.jpg.": "no extension",
    "Thumbs.db": "hidden",
    "desktop.ini": "hidden",
    "._x.jpg": "hidden",
    "@eaDir/x.jpg": "hidden",
    "__MACOSX/q.jpg": "hidden",
    ".ipynb_checkpoints/x-checkpoint.jpg": "hidden",
    os.fsdecode(b"caf\xe9.jpg"): "name is not UTF-8",
    os.fsdecode(b"caf.\xe9"): "no extension",
    "gone.jpg": "dead link",
    "pipe.jpg": "FIFO",
}
CONTENT = {"bad.png": b"no picture", "zero.jpg": b"", "a.bmp": picture(kind="BMP")}


def put(path: Path, name: str) -> None:
    path = path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "gone.jpg":
        path.symlink_to("/nowhere/at/all.jpg")
    elif name == "pipe.jpg":
        os.mkfifo(path)
    else:
        path.write_bytes(CONTENT.get(name, PICTURE))


@settings(max_examples=20)
@given(
    st.dictionaries(
        st.sampled_from(["ant", "bee", "cow", "d.e"]),
        st.lists(st.sampled_from(sorted(NAMES)), min_size=1, max_size=8, unique=True),
        min_size=1,
    )
)
def test_every_file_of_any_tree_is_accounted_for(tree: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        expected: Counter[str] = Counter()
        for where, names in {**tree, "ant": [*tree.get("ant", []), "x.jpg"]}.items():
            for name in dict.fromkeys(names):
                put(source / where, name)
                expected[NAMES[name]] += 1
        said = run(source, Path(folder) / "dst")
        walked = sum(len(files) for _, _, files in os.walk(source))
        assert said["num_seen"] == walked == expected.total()
        assert said["num_samples"] == expected.pop("stored")
        assert said["num_rejected"] == expected.pop("rejected", 0)
        assert said["left_out"] == expected
        assert sum(said["rejected"].values()) == said["num_rejected"]
        report = Path(folder) / "dst" / "left_out.json"
        assert report.exists() == bool(expected or said["notes"])
        if expected:
            told = json.loads(report.read_text())
            assert told["seen"] == told["stored"] + told["rejected"] + sum(
                expected.values()
            )
            assert {
                reason: len(names) for reason, names in told["names"].items()
            } == expected


def test_one_closing_line_gives_the_sum(tmp_path, capsys):
    for name in NAMES:
        put(tmp_path / "src" / "ant", name)
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers", "1"]) == 0
    [line] = [line for line in capsys.readouterr().err.splitlines() if "Seen" in line]
    seen, stored, rejected, left_out = (
        int(re.search(pattern, line)[1])
        for pattern in (
            r"Seen (\d+)",
            r"(\d+) stored",
            r"(\d+) rejected",
            r"(\d+) left out",
        )
    )
    assert seen == len(NAMES) == stored + rejected + left_out
    assert (stored, rejected) == (2, 3)
    # The same command again says the same.
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--workers", "1"]) == 0
    assert line in capsys.readouterr().err.splitlines()


def test_dead_links_are_named_with_their_target(tmp_path):
    put(tmp_path / "src" / "bee", "x.jpg")
    put(tmp_path / "src" / "bee", "gone.jpg")
    (tmp_path / "src" / "loop.jpg").symlink_to("loop.jpg")
    said = run(tmp_path / "src", tmp_path / "dst")
    assert said["left_out_names"]["dead link"] == [
        "bee/gone.jpg -> /nowhere/at/all.jpg",
        "loop.jpg -> loop.jpg",
    ]


def test_folders_that_get_no_class_number_are_named(tmp_path):
    for name in ("bee", "dog"):
        put(tmp_path / "src" / name, "x.jpg")
    (tmp_path / "src" / "ant").mkdir()
    put(tmp_path / "src" / "cow", "note.txt")
    (tmp_path / "src" / "cat").symlink_to("/nowhere/cat")
    (tmp_path / "src" / ".git").mkdir()
    said = run(tmp_path / "src", tmp_path / "dst")
    assert said["notes"] == [
        "2 class folders hold no image and get no class number: ant, cow",
        "1 class folders are dead links and get no class number: cat -> /nowhere/cat",
    ]


def test_a_folder_that_two_paths_reach_is_told(tmp_path):
    put(tmp_path / "src" / "bee", "x.jpg")
    (tmp_path / "src" / "bee" / "again").symlink_to("..")
    said = run(tmp_path / "src", tmp_path / "dst")
    assert said["num_seen"] == 1
    assert said["notes"] == [
        "1 folders are reached twice and are listed once: bee/again"
    ]


def test_sockets_and_devices_are_told(tmp_path):
    put(tmp_path / "src", "x.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "src" / "s.jpg"))
        said = run(tmp_path / "src", tmp_path / "dst")
    assert said["left_out"] == {"socket": 1}


def test_what_a_limit_leaves_is_told(tmp_path):
    for number in range(5):
        (tmp_path / "src").mkdir(exist_ok=True)
        (tmp_path / "src" / f"{number}.jpg").write_bytes(PICTURE)
    said = run(tmp_path / "src", tmp_path / "dst", "--limit", "3")
    assert (said["num_seen"], said["left_out"]) == (5, {"beyond --limit": 2})


def test_an_ordinary_conversion_has_no_report(tmp_path):
    put(tmp_path / "src", "x.jpg")
    convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)
    assert not (tmp_path / "dst" / "left_out.json").exists()


@pytest.mark.parametrize(
    "litter", [".DS_Store", "@eaDir/x", "Thumbs.db", "lost+found/x"]
)
def test_hidden_files_do_not_make_a_target_somebody_elses(tmp_path, litter):
    put(tmp_path / "src", "x.jpg")
    put(tmp_path / "dst", litter)
    assert (
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1).num_samples
        == 1
    )
    assert (tmp_path / "dst" / litter).exists()


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("._n01440764.tar", True),
        ("a/.DS_Store", True),
        ("a/@eaDir/b.jpg@SynoFile", True),
        ("THUMBS.DB", True),
        ("a/Desktop.ini", True),
        ("$RECYCLE.BIN/x.jpg", True),
        ("lost+found", True),
        ("lost+found.jpg", False),
        ("a/b.c/x.jpg", False),
        ("my_Thumbs.db", False),
        ("thumbs.db.jpg", False),
    ],
)
def test_what_is_hidden(name, hidden):
    assert is_hidden(name) == hidden


def test_images_in_a_tar_are_accounted_for(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name in (
            "cat/x.jpg",
            "cat/._x.jpg",
            "dog/y.jpg",
            "dog/bad.png",
            "README.md",
        ):
            data = CONTENT.get(name.rpartition("/")[2], PICTURE)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    said = run(path, tmp_path / "dst")
    assert (said["num_seen"], said["num_samples"], said["num_rejected"]) == (5, 2, 1)
    assert said["left_out"] == {"hidden": 1, ".md": 1}


def test_a_source_without_an_image_says_what_was_seen(tmp_path):
    put(tmp_path / "src", "note.txt")
    put(tmp_path / "src", "gone.jpg")
    with pytest.raises(DataError, match=r"1 \.txt, 1 dead link|1 dead link, 1 \.txt"):
        convert(
            str(tmp_path / "src"), str(tmp_path / "dst"), ConvertSettings(), workers=1
        )
