"""What people really have: shards by name, splits, links, packed archives, litter, odd keys."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.convert.__main__ import main
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.dataset.splits import pattern_per_split, split_of
from pipeline.errors import ConfigError, DataError, MaelstromError
from pipeline.formats.webdataset import RESERVED_NAME, split_key
from pipeline.sources.choose import find_kind
from pipeline.sources.listing import SourceSettings
from pipeline.sources.names import sample_keys
from pipeline.storage.patterns import expand_braces, find_named
from pipeline.verify import main as verify_main
from pipeline.verify import verify, write_manifest


def picture(red: int = 0, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 12), (red, 90, 30)).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def tar_bytes(members: dict[str, bytes | str]) -> bytes:
    """Pack members; a text is the target of a symbolic link, `=x` that of a hard link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type = (
                    tarfile.LNKTYPE if data.startswith("=") else tarfile.SYMTYPE
                )
                member.linkname = data.removeprefix("=")
                archive.addfile(member)
                continue
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def pack(path: Path, members: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(members))
    return path


def shard(path: Path, count: int = 2, start: int = 0) -> Path:
    members: dict[str, bytes | str] = {}
    for number in range(start, start + count):
        key = f"{number:06d}"
        members[f"{key}.jpg"] = picture(number)
        members[f"{key}.cls"] = str(number % 2).encode()
        members[f"{key}.json"] = json.dumps({"n": number}).encode()
    return pack(path, members)


def made(
    source: object, target: Path, **options: object
) -> dict[str, tuple[int, dict]]:
    """Convert; return label and JSON of every sample by key."""
    convert(str(source), str(target), ConvertSettings(**options), workers=1)
    assert verify(str(target), full=True).problems == []
    dataset = open_dataset(str(target))
    count = dataset.info.num_samples
    labels = dataset.lookup(np.arange(count)).labels_B.tolist()
    jsons = {}
    for path in sorted(target.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".json"):
                    jsons[member.name[:-5]] = json.loads(
                        archive.extractfile(member).read()
                    )
    return {
        key: (label, jsons.get(key, {}))
        for key, label in zip(dataset.keys(np.arange(count)), labels, strict=True)
    }


def left_out(target: Path) -> dict:
    return json.loads((target / "left_out.json").read_text())


# ------------------------------------------------------------------------------- one shard by name


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a.jpg", "a.cls"], "dataset"),
        (["a.json", "a.png"], "dataset"),
        (["a.txt", "a.jpg", "b.txt", "b.jpg"], "dataset"),
        (["README", "__meta__/x.json", "a.webp", "a.cls"], "dataset"),
        (["a.image.jpg", "a.json"], "dataset"),
        (["./a.jpg", "./a.json"], "dataset"),
        (["a.jpg", "b.jpg"], "tar"),
        (["cat/a.jpg", "dog/b.jpg", "README.txt"], "tar"),
        (["images/a.jpg", "labels/a.txt"], "tar"),
        (["a.jpg", "b.jpg", "a.json", "b.json"], "tar"),
        (["IMG.001.jpg", "IMG.001.txt", "IMG.002.jpg", "IMG.002.txt"], "tar"),
        (["a.jpg", "._a.jpg", "._a.txt", "b.jpg"], "tar"),
    ],
)
def test_neighbours_that_share_a_key_make_a_tar_a_shard(tmp_path, names, kind):
    for name in ("x.tar", "X.TAR"):
        path = pack(tmp_path / name, {name: picture() for name in names})
        assert find_kind(str(path), SourceSettings()) == kind


@pytest.mark.parametrize("name", ["x.tar", "in [1] {a,b}/x-000000.TAR"])
def test_a_shard_by_its_own_name_keeps_labels_and_json(tmp_path, name):
    path = shard(tmp_path / name)
    samples = made(path, tmp_path / "dst")
    assert samples == {"000000": (0, {"n": 0}), "000001": (1, {"n": 1})}
    assert open_dataset(str(path)).info.num_samples == 2
    assert verify(str(path), full=True).problems == []


@pytest.mark.parametrize("name", ["x.jpg", "x.csv", "dataset.txt"])
def test_a_file_that_is_not_a_shard_is_told_to_convert(tmp_path, name):
    (tmp_path / name).write_bytes(picture())
    for call in (open_dataset, verify):
        with pytest.raises(DataError, match=r"is a file.*pipeline\.convert"):
            call(str(tmp_path / name))


def test_captions_are_left_out_and_counted(tmp_path):
    members = {
        "a.jpg": picture(),
        "a.txt": b"a cat",
        "a.json": b"{}",
        "b.jpg": picture(1),
    }
    path = pack(
        tmp_path / "src" / "x.tar", {**members, "b.txt": b"a dog", "b.npy": b"1"}
    )
    made(path, tmp_path / "dst")
    assert left_out(tmp_path / "dst")["left_out"] == {
        "extension .txt": 2,
        "extension .npy": 1,
    }
    # The scan is kept; what it left out is told again.
    made(path.parent, tmp_path / "dst2")
    assert left_out(tmp_path / "dst2")["seen"] == 5
    write_manifest(str(path.parent))
    made(path.parent, tmp_path / "dst3")
    assert left_out(tmp_path / "dst3")["seen"] == 5


# ---------------------------------------------------------------------------------------- hidden

LITTER = [
    "._n01440764.tar",
    ".DS_Store",
    "@eaDir/n01440764.tar",
    "Thumbs.db",
    ".git/x.tar",
]


@pytest.mark.parametrize("litter", LITTER)
def test_litter_beside_class_tars_decides_nothing(tmp_path, litter):
    for number, wnid in enumerate(("n01440764", "n02119789")):
        pack(tmp_path / "src" / f"{wnid}.tar", {f"{wnid}_1.JPEG": picture(number)})
    (tmp_path / "src" / litter).parent.mkdir(exist_ok=True)
    (tmp_path / "src" / litter).write_bytes(b"\0\5\26\7")
    samples = made(tmp_path / "src", tmp_path / "dst")
    assert {label for label, _ in samples.values()} == {0, 1}
    assert left_out(tmp_path / "dst")["left_out"] == {"hidden": 1}


@pytest.mark.parametrize(
    "litter", ["._a.tar", ".DS_Store", "__MACOSX/a.tar", "desktop.ini"]
)
def test_litter_beside_shards_decides_nothing(tmp_path, litter):
    shard(tmp_path / "a.tar")
    (tmp_path / litter).parent.mkdir(exist_ok=True)
    (tmp_path / litter).write_bytes(b"\0\5\26\7")
    assert verify(str(tmp_path)).problems == []
    write_manifest(str(tmp_path))
    for full in (False, True):
        assert verify(str(tmp_path), full=full).problems == []


def test_litter_in_a_shard_makes_no_samples(tmp_path):
    members = {"._a.jpg": b"\0", "a.jpg": picture(), "._a.cls": b"\0", "a.cls": b"1"}
    pack(tmp_path / "src" / "x.tar", {**members, "__MACOSX/._a.jpg": b"\0"})
    assert made(tmp_path / "src", tmp_path / "dst") == {"a": (1, {})}
    assert left_out(tmp_path / "dst")["left_out"] == {"hidden": 3}


# ---------------------------------------------------------------------------------------- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("imagenet1k-train-0000", "train"),
        ("imagenet1k-validation-00", "validation"),
        ("COCO_val2017_0", "validation"),
        ("test", "test"),
        ("Dev-1", "validation"),
        ("valley-000", None),
        ("training_set", "train"),
        ("contest-1", None),
        ("0000", None),
    ],
)
def test_the_split_that_a_name_says(name, split):
    assert split_of(name) == split


def test_what_to_type_for_each_split():
    names = ["x-train-0.tar", "x-train-1.tar", "x-val-0.tar", "other.tar"]
    assert pattern_per_split(names) == {
        "train": "x-train-*.tar",
        "validation": "x-val-*.tar",
    }
    assert pattern_per_split(["train.tar", "val.tar"]) == {
        "train": "train.tar",
        "validation": "val.tar",
    }
    assert pattern_per_split(names[:2]) == {}
    assert pattern_per_split(["a-train.tar", "b-train.tar", "a-val.tar"])["train"] == (
        "a-train.tar,b-train.tar"
    )


@pytest.mark.parametrize(
    "names",
    [
        ["in1k-train-0000.tar", "in1k-train-0001.tar", "in1k-validation-00.tar"],
        ["train-000000.tar", "val-000000.tar"],
        ["coco_train2017_0.tar", "coco_val2017_0.tar"],
        ["train.tar", "test.tar"],
        ["dev_0.TAR", "train_0.TAR"],
    ],
)
def test_shards_of_two_splits_are_not_one_dataset(tmp_path, names):
    for number, name in enumerate(names):
        shard(tmp_path / "src" / name, start=2 * number)
    calls = [
        lambda: open_dataset(str(tmp_path / "src")),
        lambda: verify(str(tmp_path / "src")),
        lambda: write_manifest(str(tmp_path / "src")),
        lambda: convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1),
    ]
    for call in calls:
        with pytest.raises(MaelstromError, match="splits") as caught:
            call()
    # What the message says to type works.
    told = str(caught.value).partition("in quotes: ")[2].split("; ")
    assert len(told) == 2
    num_samples = [
        open_dataset(part.partition(": ")[2]).info.num_samples for part in told
    ]
    assert sum(num_samples) == 2 * len(names)


@pytest.mark.parametrize(
    "names",
    [
        [
            "train-00000-of-00002.parquet",
            "train-00001-of-00002.parquet",
            "validation-0.parquet",
        ],
        ["train.parquet", "test.parquet"],
        ["data/train-0.parquet", "data/val-0.parquet"],
    ],
)
def test_parquet_files_of_two_splits_are_not_one_source(tmp_path, names):
    for number, name in enumerate(names):
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"image": [picture(number)], "label": [number]})
        pq.write_table(table, tmp_path / "src" / name)
    with pytest.raises(ConfigError, match="splits") as caught:
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)
    told = str(caught.value).partition("in quotes: ")[2].split("; ")
    for number, part in enumerate(told):
        assert made(part.partition(": ")[2], tmp_path / f"dst{number}")


@pytest.mark.parametrize(
    "folders",
    [
        ["train", "val"],
        ["training", "validation", "test"],
        ["Train"],
        ["train", "val", "extra"],
    ],
)
def test_folders_called_like_splits_are_not_classes(tmp_path, folders):
    for folder in folders:
        for name in ("cat", "dog"):
            path = tmp_path / "src" / folder / name / f"{folder}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture())
    with pytest.raises(ConfigError, match="splits") as caught:
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)
    assert str(tmp_path / "src" / folders[0]) in str(caught.value)
    found = made(tmp_path / "src" / folders[0], tmp_path / "one")
    assert {label for label, _ in found.values()} == {0, 1}
    # Who says that they are classes, or wants none, is believed.
    assert made(tmp_path / "src", tmp_path / "classes", labels="folders")
    assert made(tmp_path / "src", tmp_path / "none", labels="none")


def test_splits_inside_a_folder_around_all_are_found(tmp_path):
    for folder in ("train", "val"):
        for name in ("cat", "dog"):
            path = tmp_path / "src" / "data" / "images" / folder / name / "x.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture())
    with pytest.raises(ConfigError, match=f"{tmp_path}/src/data/images/train"):
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)


def test_one_folder_around_all_classes_is_told(tmp_path):
    for name in ("cat", "dog"):
        path = tmp_path / "src" / "flowers" / name / "x.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture())
    made(tmp_path / "src", tmp_path / "dst")
    [note] = left_out(tmp_path / "dst")["notes"]
    assert "if those are the classes" in note
    assert note.endswith(": flowers")
    made(tmp_path / "src" / "flowers", tmp_path / "dst2")
    assert not (tmp_path / "dst2" / "left_out.json").exists()


def test_shards_without_a_label_are_told(tmp_path, capsys):
    for name in ("cat", "dog"):
        pack(tmp_path / "src" / f"{name}.tar", {f"{name}1.jpg": picture()})
    made(tmp_path / "src", tmp_path / "dst")
    assert "no sample" in capsys.readouterr().err
    made(tmp_path / "src", tmp_path / "dst2", labels="none")
    assert "no sample" not in capsys.readouterr().err


@pytest.mark.parametrize("folders", [["bus", "car", "train"], ["valley", "testament"]])
def test_a_class_may_be_called_like_a_split(tmp_path, folders):
    for folder in folders:
        (tmp_path / "src" / folder).mkdir(parents=True)
        (tmp_path / "src" / folder / "x.jpg").write_bytes(picture())
    assert len(made(tmp_path / "src", tmp_path / "dst")) == len(folders)


# -------------------------------------------------------------------------------------- patterns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "x-{0000..0003}.tar",
            ["x-0000.tar", "x-0001.tar", "x-0002.tar", "x-0003.tar"],
        ),
        ("x-{8..10}", ["x-8", "x-9", "x-10"]),
        ("x-{08..10}", ["x-08", "x-09", "x-10"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("plain{x}.tar", ["plain{x}.tar"]),
    ],
)
def test_what_braces_stand_for(text, expected):
    assert list(expand_braces(text)) == expected


def test_braces_of_a_slip_are_refused():
    with pytest.raises(ConfigError, match="stands for"):
        list(expand_braces("x-{0..99999999}.tar"))


@pytest.fixture
def shards(tmp_path):
    for number in range(3):
        shard(tmp_path / "d" / f"train-{number:04d}.tar", start=2 * number)
    shard(tmp_path / "d" / "val-0000.tar", start=6)
    (tmp_path / "d" / "._train-0009.tar").write_bytes(b"\0")
    return tmp_path / "d"


CHOICES = [
    ("train-*.tar", ["0000", "0001", "0002"]),
    ("train-000?.tar", ["0000", "0001", "0002"]),
    ("train-000[12].tar", ["0001", "0002"]),
    ("train-{0000..0001}.tar", ["0000", "0001"]),
    ("train-{0002,0000}.tar", ["0002", "0000"]),
    ("train-0001.tar", ["0001"]),
]


@pytest.mark.parametrize(("pattern", "numbers"), CHOICES)
@pytest.mark.parametrize(
    "has_manifest", [False, True], ids=["foreign", "part of a dataset"]
)
def test_shards_are_chosen_by_pattern_everywhere(
    tmp_path, shards, pattern, numbers, has_manifest
):
    uri = f"{shards}/{pattern}"
    if has_manifest:
        (shards / "val-0000.tar").unlink()
        write_manifest(str(shards))
    dataset = open_dataset(uri)
    assert dataset.info.shards.columns["name"] == [
        f"train-{number}.tar" for number in numbers
    ]
    checked = verify(uri, full=True)
    assert (checked.num_samples, checked.num_shards) == (2 * len(numbers), len(numbers))
    assert checked.problems == []
    assert verify_main([uri]) == 0
    assert len(made(uri, tmp_path / "dst")) == 2 * len(numbers)


def test_a_list_keeps_its_order_and_each_shard_once(tmp_path, shards):
    uri = f"{shards}/train-0002.tar,{shards}/train-000{{0..2}}.tar"
    names = open_dataset(uri).info.shards.columns["name"]
    assert names == ["train-0002.tar", "train-0000.tar", "train-0001.tar"]
    assert len(made(uri, tmp_path / "dst")) == 6


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("nope-*.tar", "matches no file"),
        ("train-{0001..0005}.tar", r"not there.*train-0003\.tar"),
        ("*.beton", "matches no file"),
        ("*.tar,", "empty part"),
    ],
)
def test_a_pattern_that_matches_none_says_so(tmp_path, shards, pattern, says):
    uri = f"{shards}/{pattern}"
    for call in (
        open_dataset,
        verify,
        lambda uri: convert(uri, str(tmp_path / "x"), workers=1),
    ):
        with pytest.raises(MaelstromError, match=says):
            call(uri)


def test_shards_of_several_folders_are_refused(tmp_path, shards):
    shard(tmp_path / "e" / "train-0000.tar")
    with pytest.raises(DataError, match="several folders"):
        open_dataset(f"{tmp_path}/{{d,e}}/train-0000.tar")


def test_a_manifest_is_not_written_for_some_shards_of_a_folder(shards):
    with pytest.raises(ConfigError, match=r"also holds val-0000\.tar"):
        write_manifest(f"{shards}/train-*.tar")
    (shards / "val-0000.tar").unlink()
    assert write_manifest(f"{shards}/train-*.tar").num_shards == 3


def test_a_file_that_has_marks_in_its_name_is_that_file(tmp_path):
    for name in ("a[1].tar", "a{0..1}.tar", "a,b.tar", "a*.tar"):
        shard(tmp_path / name)
        assert [
            file.name for file in storage.patterns.find_named(str(tmp_path / name))
        ] == [name]
        assert not storage.names_several(str(tmp_path / name))
        assert open_dataset(str(tmp_path / name)).info.num_samples == 2


def test_patterns_name_files_in_memory_as_on_disk():
    for number in range(3):
        data = tar_bytes({f"{number}.jpg": picture(number), f"{number}.cls": b"1"})
        storage.write_atomic(f"memory://patterns/d/train-{number}.tar", data)
    found = find_named(
        "memory://patterns/d/train-{0..1}.tar,memory://patterns/d/*-2.tar"
    )
    assert [file.name for file in found] == [
        "train-0.tar",
        "train-1.tar",
        "train-2.tar",
    ]
    assert open_dataset("memory://patterns/d/train-*.tar").info.num_samples == 3


# ------------------------------------------------------------------------ what lies beside shards


def test_the_output_folder_of_img2dataset_is_a_dataset(tmp_path):
    for number in range(2):
        members = {}
        for row in range(2):
            key = f"{number:05d}{row:04d}"
            members |= {
                f"{key}.jpg": picture(row),
                f"{key}.txt": b"x",
                f"{key}.json": b"{}",
            }
        pack(tmp_path / "src" / f"{number:05d}.tar", members)
        table = pa.table({"url": ["https://example.org/x.jpg"] * 2, "key": ["0", "1"]})
        pq.write_table(table, tmp_path / "src" / f"{number:05d}.parquet")
        (tmp_path / "src" / f"{number:05d}_stats.json").write_text("{}")
    (tmp_path / "src" / "preview.png").write_bytes(picture(kind="PNG"))
    assert len(made(tmp_path / "src", tmp_path / "dst")) == 4
    assert left_out(tmp_path / "dst")["left_out"] == {
        "extension .txt": 4,
        ".parquet": 2,
        ".json": 2,
        ".png": 1,
    }


def test_what_lies_in_folders_beside_shards_is_told(tmp_path):
    shard(tmp_path / "src" / "a.TAR")
    (tmp_path / "src" / "extra").mkdir()
    (tmp_path / "src" / "extra" / "x.jpg").write_bytes(picture())
    assert len(made(tmp_path / "src", tmp_path / "dst")) == 2
    assert left_out(tmp_path / "dst")["left_out"] == {"in a folder below": 1}


def test_many_images_beside_tars_are_not_guessed(tmp_path):
    shard(tmp_path / "src" / "a.tar")
    for number in range(5):
        (tmp_path / "src" / f"{number}.jpg").write_bytes(picture())
    with pytest.raises(ConfigError, match=r"holds images and tars.*\*\.tar"):
        find_kind(str(tmp_path / "src"), SourceSettings())


@pytest.mark.parametrize("zeros", [1024, 10240])
def test_an_empty_archive_in_a_set_is_a_warning(tmp_path, zeros, caplog):
    shard(tmp_path / "src" / "a.tar")
    (tmp_path / "src" / "b.tar").write_bytes(bytes(zeros))
    assert verify(str(tmp_path / "src")).problems == []
    assert open_dataset(str(tmp_path / "src")).info.num_shards == 1
    assert "1 empty archive" in caplog.text
    write_manifest(str(tmp_path / "src"))
    assert verify(str(tmp_path / "src"), full=True).problems == []
    (tmp_path / "src" / "a.tar").unlink()
    (tmp_path / "src" / "dataset.json").unlink()
    with pytest.raises(DataError, match="empty"):
        open_dataset(str(tmp_path / "src"))
    assert verify(str(tmp_path / "src")).problems


def test_a_file_without_a_byte_is_still_a_damaged_shard(tmp_path):
    shard(tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.tar: the file is empty"):
        open_dataset(str(tmp_path))


# ---------------------------------------------------------------------------------- links in tars


def test_links_in_a_tar_of_images_have_their_targets_bytes(tmp_path):
    members = {
        "cat/first.jpg": "later.jpg",
        "cat/later.jpg": picture(7),
        "dog/hard.jpg": "=cat/later.jpg",
        "dog/soft.jpg": "../cat/first.jpg",
        "dog/out.jpg": "../../../etc/passwd",
        "dog/absolute.jpg": "/etc/passwd",
        "dog/hard_out.jpg": "=elsewhere.jpg",
        "dog/loop.jpg": "loop.jpg",
        "dog/pair.jpg": "riap.jpg",
        "dog/riap.jpg": "pair.jpg",
    }
    path = pack(tmp_path / "x.tar", members)
    samples = made(path, tmp_path / "dst")
    assert sorted(samples) == ["cat/first", "cat/later", "dog/hard", "dog/soft"]
    for shard_path in (tmp_path / "dst").glob("*.tar"):
        with tarfile.open(shard_path) as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    assert (
                        archive.extractfile(member).read() == members["cat/later.jpg"]
                    )
    report = left_out(tmp_path / "dst")
    assert report["seen"] == len(members)
    [names] = report["names"].values()
    assert "dog/out.jpg -> ../../../etc/passwd" in names
    assert len(names) == 6


def test_links_in_a_shard_have_their_targets_bytes(tmp_path):
    members = {
        "a.jpg": picture(7),
        "a.cls": b"3",
        "a.json": b'{"n": 1}',
        "b.jpg": "a.jpg",
        "b.cls": "=a.cls",
        "b.json": "=a.json",
        "c.jpg": "/etc/passwd",
        "c.cls": b"2",
        "d.jpg": picture(8),
        "d.cls": "../../outside.cls",
    }
    pack(tmp_path / "src" / "x.tar", members)
    assert verify(str(tmp_path / "src"), full=True).problems == []
    samples = made(tmp_path / "src", tmp_path / "dst")
    assert samples == {"a": (3, {"n": 1}), "b": (3, {"n": 1}), "d": (-1, {})}
    counts = left_out(tmp_path / "dst")["left_out"]
    assert sorted(counts.values()) == [1, 2]
    write_manifest(str(tmp_path / "src"))
    assert verify(str(tmp_path / "src"), full=True).problems == []


# ------------------------------------------------------------------------------------------- gzip


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "X.TGZ", "x.tar", "x.TAR.GZ"])
@pytest.mark.parametrize("what", ["shard", "images", "class tars"])
def test_gzip_is_read_and_trained_on_never(tmp_path, monkeypatch, name, what):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    plain = {
        "shard": shard(tmp_path / "plain" / "x.tar"),
        "images": pack(
            tmp_path / "images.tar", {"cat/a.jpg": picture(), "dog/b.jpg": picture(1)}
        ),
        "class tars": pack(
            tmp_path / "classes.tar",
            {
                "n01440764.tar": tar_bytes({"n01440764_1.JPEG": picture()}),
                "n02119789.tar": tar_bytes({"n02119789_1.JPEG": picture(1)}),
            },
        ),
    }[what]
    (tmp_path / "src").mkdir()
    packed = tmp_path / "src" / name
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    expected = made(plain, tmp_path / "expected")
    assert made(packed, tmp_path / "dst") == expected
    for path in (tmp_path / "expected").glob("*.tar"):
        assert (tmp_path / "dst" / path.name).read_bytes() == path.read_bytes()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert main([str(packed), str(tmp_path / "dry"), "--dry-run"]) == 0
    for uri in (packed.parent, packed):
        with pytest.raises(DataError, match=r"python -m pipeline\.convert"):
            open_dataset(str(uri))
    assert "pipeline.convert" in str(verify_refusal(packed.parent))


def verify_refusal(uri: Path) -> str:
    try:
        return " ".join(problem.problem for problem in verify(str(uri)).problems)
    except DataError as error:
        return str(error)


def test_a_folder_of_packed_shards_is_read(tmp_path):
    for number in range(2):
        plain = shard(tmp_path / "x.tar", start=2 * number)
        (tmp_path / "src").mkdir(exist_ok=True)
        packed = gzip.compress(plain.read_bytes())
        (tmp_path / "src" / f"s-{number}.tar.gz").write_bytes(packed)
    (tmp_path / "src" / "notes.md").write_text("x")
    assert len(made(tmp_path / "src", tmp_path / "dst")) == 4
    assert left_out(tmp_path / "dst")["left_out"] == {".md": 1}
    assert len(made(f"{tmp_path}/src/*.tar.gz", tmp_path / "dst2")) == 4


@pytest.mark.parametrize("backup", ["x.zip", "x.tar.gz", "x.tgz", "x.tar.bz2", "x.7z"])
@pytest.mark.parametrize("names", [["a.jpg"], ["cat/a.jpg", "dog/b.jpg"]])
def test_an_archive_beside_images_is_left_out(tmp_path, backup, names):
    for name in names:
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_bytes(picture())
    (tmp_path / "src" / backup).write_bytes(
        gzip.compress(tar_bytes({"a.jpg": picture()}))
    )
    assert len(made(tmp_path / "src", tmp_path / "dst")) == len(names)
    assert sum(left_out(tmp_path / "dst")["left_out"].values()) == 1


@pytest.mark.parametrize("packed", [False, True])
def test_an_archive_beside_plain_shards_is_left_out(tmp_path, packed):
    plain = shard(tmp_path / "src" / "a.tar")
    (tmp_path / "src" / "backup.tar.gz").write_bytes(gzip.compress(plain.read_bytes()))
    if packed:
        # Called .tar, and a shard among shards.
        other = gzip.compress(shard(tmp_path / "x.tar", start=2).read_bytes())
        (tmp_path / "src" / "b.tar").write_bytes(other)
    assert len(made(tmp_path / "src", tmp_path / "dst")) == (4 if packed else 2)
    assert left_out(tmp_path / "dst")["left_out"] == {".gz": 1}


@pytest.mark.parametrize("damage", ["cut", "flipped", "junk"])
def test_a_damaged_gzip_is_an_error(tmp_path, damage):
    data = bytearray(gzip.compress(shard(tmp_path / "x.tar", count=20).read_bytes()))
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "flipped":
        data[len(data) // 2] ^= 255
    else:
        data[2:] = b"junk" * 100
    (tmp_path / "x.tar.gz").write_bytes(bytes(data))
    with pytest.raises(DataError, match="cut or damaged"):
        convert(str(tmp_path / "x.tar.gz"), str(tmp_path / "dst"), workers=1)


@pytest.mark.parametrize(
    ("name", "packer", "command"),
    [
        ("x.tar.bz2", bz2.compress, "bunzip2"),
        ("x.tbz2", bz2.compress, "bunzip2"),
        ("x.tar.xz", lzma.compress, "unxz"),
        ("x.tar", bz2.compress, "bunzip2"),
        ("x.tar", lzma.compress, "unxz"),
        ("x.tar.zst", lambda data: b"\x28\xb5\x2f\xfd" + data, "unzstd"),
        ("x.zip", None, "unzip"),
    ],
)
def test_other_compression_is_named_with_what_unpacks_it(
    tmp_path, name, packer, command
):
    plain = shard(tmp_path / "plain" / "x.tar").read_bytes()
    path = tmp_path / "src" / name
    path.parent.mkdir()
    if packer is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.jpg", picture())
    else:
        path.write_bytes(packer(plain))
    for source in (path, path.parent):
        with pytest.raises(MaelstromError, match=command):
            convert(str(source), str(tmp_path / "dst"), workers=1)


# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["000000", "000000"], ["000000-0", "000000-1"]),
        (["my photo", "my photo"], ["my_photo-0", "my_photo-1"]),
        (["my photo.jpg", "my photo.jpg"], ["my_photo-jpg-0", "my_photo-jpg-1"]),
        (["a.b c", "a.b c"], ["a-b_c-0", "a-b_c-1"]),
        (["a.b.jpg", "a_b.jpg"], ["a_b-jpg-0", "a_b-jpg-1"]),
        (["a.jpg", "a.png"], ["a-jpg", "a-png"]),
        (["d/.jpg"], ["d/_"]),
    ],
)
def test_one_rule_for_keys(names, keys):
    assert sample_keys(pa.array(names)).to_pylist() == keys


@settings(max_examples=200)
@given(
    st.lists(
        st.text(
            st.characters(exclude_categories=["Cs"]) | st.sampled_from("./_ -0a"),
            max_size=9,
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_names_make_keys_that_a_shard_can_hold(names):
    keys = sample_keys(pa.array(names, pa.string())).to_pylist()
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert key.split() == [key]
        assert split_key(f"{key}.jpg") == (key, "jpg")
        assert not RESERVED_NAME.match(key)


def test_keys_that_shards_share_stay_readable(tmp_path):
    for number in range(2):
        members = {"000000.jpg": picture(number), "my photo.jpg": picture(number + 5)}
        pack(tmp_path / "src" / f"{number}.tar", members)
    keys = sorted(made(tmp_path / "src", tmp_path / "dst"))
    assert keys == ["000000-0", "000000-2", "my_photo-1", "my_photo-3"]


# ------------------------------------------------------------------------------ what to do next


@pytest.mark.parametrize("component", ["image.jpg", "1.jpg", "2.JPG", ".1.jpg"])
def test_a_component_can_be_chosen(tmp_path, component):
    members = {}
    for number in range(2):
        members[f"{number}.image.jpg"] = picture(10 + number)
        members[f"{number}.1.jpg"] = picture(20 + number)
        members[f"{number}.2.jpg"] = picture(30 + number)
        members[f"{number}.cls"] = b"1"
    path = pack(tmp_path / "src" / "x.tar", members)
    for call in (
        lambda: convert(str(path.parent), str(tmp_path / "no"), workers=1),
        lambda: convert(str(path), str(tmp_path / "no"), workers=1),
        lambda: open_dataset(str(path)),
    ):
        with pytest.raises(DataError, match=r"--image-component (image|1|2)\.jpg"):
            call()
    samples = made(path.parent, tmp_path / "dst", image_component=component)
    assert {label for label, _ in samples.values()} == {1}
    stored = b"".join(file.read_bytes() for file in (tmp_path / "dst").glob("*.tar"))
    wanted = members[f"0.{component.lower().removeprefix('.')}"]
    assert wanted in stored
    assert sum(left_out(tmp_path / "dst")["left_out"].values()) == 4
    # Training on the shards as they are: the manifest remembers the choice.
    write_manifest(str(path.parent), image_component=component)
    assert verify(str(path.parent), full=True).problems == []
    assert open_dataset(str(path.parent)).info.num_samples == 2


def test_a_component_is_refused_if_there_is_no_sample(tmp_path):
    (tmp_path / "a.jpg").write_bytes(picture())
    with pytest.raises(ConfigError, match="--image-component"):
        convert(
            str(tmp_path),
            str(tmp_path.parent / "x"),
            ConvertSettings(image_component="1.jpg"),
            workers=1,
        )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("train/x-0.tar", "train"),
        ("a/b/x.parquet", "a/b"),
        ("lists/x.csv", "lists/x.csv"),
    ],
)
def test_what_lies_one_folder_deeper_is_named(tmp_path, name, told):
    path = shard(tmp_path / "src" / name)
    with pytest.raises(DataError, match=f"{tmp_path}/src/{told}"):
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)
    if path.suffix == ".tar":
        for call in (open_dataset, verify):
            with pytest.raises(DataError, match=f"{tmp_path}/src/{told}"):
                call(str(tmp_path / "src"))


@pytest.mark.parametrize(
    "members",
    [
        {"a.jpg": b"1", "b.jpg": b"1", "a.cls": b"1"},
        {"a.cls": b"1"},
        {"../a.jpg": b"1"},
    ],
    ids=["not adjacent", "no image", "leaves the folder"],
)
def test_what_copying_cannot_mend_does_not_say_copy_it_again(tmp_path, members):
    pack(tmp_path / "x.tar", members)
    [problem] = verify(str(tmp_path)).problems
    assert "copy it again" not in problem.problem
    assert "Copying the file again does not help" in problem.problem
