"""Where images may come from: ImageNet's tars, Parquet, lists. What comes out is what the folder
gives."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.convert.conversion import convert
from pipeline.convert.plan import make_plan
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import DatasetInfo, open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.sources import listing as listing_module
from pipeline.sources.choose import open_source
from pipeline.sources.ground_truth import read_ground_truth
from pipeline.sources.listing import ListingBuilder, SourceSettings
from pipeline.sources.names import why_skipped
from pipeline.sources.parquet import file_locations
from pipeline.verify import verify

WNIDS = ("n01440764", "n02119789", "n02100735")
"""In this order ImageNet's devkit numbers the last two first: an ILSVRC2012_ID is no place in the
sorted names."""
IDS = {"n02119789": 1, "n02100735": 2, "n01440764": 3}
FEW = ConvertSettings(samples_per_shard=5)


@pytest.fixture
def folder(make_class_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """Give ImageNet's train folder in small: <wnid>/<wnid>_<n>.JPEG."""
    root = make_class_folder(num_classes=3, per_class=4, root=tmp_path / "folder")
    for path, wnid in zip(sorted(root.iterdir()), WNIDS, strict=True):
        for image in path.iterdir():
            image.rename(path / f"{wnid}_{int(image.stem)}.JPEG")
        path.rename(root / wnid)
    return root


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1_300_000_000
            archive.addfile(member, io.BytesIO(data))
    return path


def pack_train(folder: Path, path: Path) -> Path:
    tars = {}
    for wnid in folder.iterdir():
        inner = pack(
            path.parent / f"{wnid.name}.tmp",
            {file.name: file.read_bytes() for file in wnid.iterdir()},
        )
        tars[f"{wnid.name}.tar"] = inner.read_bytes()
        inner.unlink()
    return pack(path, tars)


def made(
    src: object, tmp_path: Path, settings: ConvertSettings = FEW, name: str = "dst"
) -> DatasetInfo:
    info = convert(str(src), str(tmp_path / name), settings, workers=1)
    assert verify(str(tmp_path / name), full=True).problems == []
    return info


def labels_by_key(folder: Path) -> dict[str, str]:
    dataset = open_dataset(str(folder))
    ids = np.arange(dataset.info.num_samples)
    classes = dataset.info.classes or []
    labels = dataset.lookup(ids).labels_B.tolist()
    return {
        key: classes[label]
        for key, label in zip(dataset.keys(ids), labels, strict=True)
    }


# --------------------------------------------------------------------------------------------- tars


def test_imagenets_train_tar_gives_what_its_folder_gives(
    folder: Path, tmp_path: Path
) -> None:
    expected = made(folder, tmp_path)
    tar = pack_train(folder, tmp_path / "ILSVRC2012_img_train.tar")
    assert made(tar, tmp_path, name="from_tar") == expected
    for path in (tmp_path / "dst").iterdir():
        assert path.read_bytes() == (tmp_path / "from_tar" / path.name).read_bytes()
    (tmp_path / "tars").mkdir()
    for wnid in folder.iterdir():
        pack(
            tmp_path / "tars" / f"{wnid.name}.tar",
            {f"./{f.name}": f.read_bytes() for f in wnid.iterdir()},
        )
    assert made(tmp_path / "tars", tmp_path, name="from_tars") == expected


def test_a_tar_of_class_folders_is_a_folder(folder: Path, tmp_path: Path) -> None:
    files = {
        f"data/train/{p.relative_to(folder)}": p.read_bytes()
        for p in folder.rglob("*.JPEG")
    }
    assert made(
        pack(tmp_path / "x.tar", {**files, "data/README": b"x"}), tmp_path, name="b"
    ) == made(folder, tmp_path)


def test_a_cut_tar_of_tars_is_refused(folder: Path, tmp_path: Path) -> None:
    tar = pack_train(folder, tmp_path / "train.tar")
    data = tar.read_bytes()
    tar.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"train\.tar: the file ends inside the data of"
    ):
        open_source(str(tar)).listing()


def save_meta(path: Path, ids: dict[str, int]) -> None:
    """Write the devkit's meta.mat: classes by ILSVRC2012_ID, then groups of them."""
    savemat = pytest.importorskip("scipy.io").savemat
    rows = [
        (number, wnid, 0)
        for wnid, number in sorted(ids.items(), key=lambda row: row[1])
    ]
    rows.append((len(ids) + 1, "n00001740", 2))
    table = np.array(
        rows, [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    ).reshape(-1, 1)
    savemat(path, {"synsets": table})


@pytest.fixture
def val(folder: Path, tmp_path: Path) -> tuple[Path, dict[str, str], Path]:
    """Give the val tar of all images of the folder, the class of each, and the devkit's folder."""
    found = {}
    files = {}
    for number, path in enumerate(
        sorted(folder.rglob("*.JPEG"), key=lambda p: p.name[::-1]), start=1
    ):
        files[f"ILSVRC2012_val_{number:08d}.JPEG"] = path.read_bytes()
        found[f"ILSVRC2012_val_{number:08d}"] = path.parent.name
    devkit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    devkit.mkdir(parents=True)
    (devkit / "ILSVRC2012_validation_ground_truth.txt").write_text(
        "".join(f"{IDS[w]}\n" for w in found.values())
    )
    save_meta(devkit / "meta.mat", IDS)
    return pack(tmp_path / "ILSVRC2012_img_val.tar", files), found, devkit.parent


def test_imagenets_val_tar_agrees_with_the_train_set(
    folder: Path, val: tuple[Path, dict[str, str], Path], tmp_path: Path
) -> None:
    tar, classes, devkit = val
    packed = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(devkit, devkit.name)
    truth = devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    (tmp_path / "wnids.txt").write_text(
        "".join(f"{wnid}\n" for wnid in classes.values())
    )
    (tmp_path / "ids.txt").write_text(
        "".join(f"{number} {wnid}\n" for wnid, number in IDS.items())
    )
    rows = "".join(
        f"{name},{wnid} 1 2 3 4\n" for name, wnid in reversed(classes.items())
    )
    (tmp_path / "solution.csv").write_text(f"ImageId,PredictionString\n{rows}")
    expected = made(folder, tmp_path).classes
    ways: list[tuple[Path, Path | None]] = [
        (devkit, None),
        (packed, None),
        (truth, devkit / "data" / "meta.mat"),
        (truth, tmp_path / "ids.txt"),
        (tmp_path / "wnids.txt", None),
        (tmp_path / "solution.csv", None),
    ]
    for number, (ground_truth, synsets) in enumerate(ways):
        settings = ConvertSettings(
            split="val",
            ground_truth=str(ground_truth),
            synsets=str(synsets) if synsets else None,
        )
        assert made(tar, tmp_path, settings, name=f"val{number}").classes == expected
        assert labels_by_key(tmp_path / f"val{number}") == classes
        assert (tmp_path / f"val{number}" / "dataset.json").read_bytes() == (
            tmp_path / "val0/dataset.json"
        ).read_bytes()


def test_numbers_that_could_be_taken_wrongly_are_refused(
    val: tuple[Path, dict[str, str], Path], tmp_path: Path
) -> None:
    truth = str(val[2] / "data" / "ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(ConfigError, match="ILSVRC2012_IDs and not places"):
        read_ground_truth(truth)
    (tmp_path / "sorted.txt").write_text("\n".join(sorted(WNIDS)))
    with pytest.raises(DataError, match="in sorted order"):
        read_ground_truth(truth, str(tmp_path / "sorted.txt"))
    (tmp_path / "few.txt").write_text("n01440764\n" * 11)
    with pytest.raises(DataError, match="the classes of 11 images, but there are 12"):
        open_source(
            str(val[0]), SourceSettings(ground_truth=str(tmp_path / "few.txt"))
        ).listing()
    (tmp_path / "caffe.txt").write_text("ILSVRC2012_val_00000001.JPEG 65\n")
    with pytest.raises(DataError, match="cannot be understood"):
        read_ground_truth(str(tmp_path / "caffe.txt"))


def test_a_folder_of_distributed_tars_asks_for_one(
    val: tuple[Path, dict[str, str], Path], tmp_path: Path
) -> None:
    (tmp_path / "as_distributed").mkdir()
    val[0].rename(tmp_path / "as_distributed" / val[0].name)
    with pytest.raises(ConfigError, match="Give that file as the source"):
        open_source(str(tmp_path / "as_distributed"))


# ------------------------------------------------------------------------------------------ Parquet


def write_parquet(
    folder: Path,
    root: Path,
    *,
    files: int = 2,
    rows_per_group: int = 3,
    text: bool = False,
) -> Path:
    """Write what Hugging Face's datasets writes: image = (bytes, path), label = number, names in
    the schema."""
    paths = sorted(folder.rglob("*.JPEG"), key=lambda p: p.name[::-1])
    features = {
        "image": {"_type": "Image"},
        "label": {"names": sorted(WNIDS), "_type": "ClassLabel"},
    }
    head = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    root.mkdir(exist_ok=True)
    for number in range(files):
        part = paths[number::files]
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in part]
        names = [path.parent.name for path in part]
        columns = {
            "image": pa.array(
                images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            ),
            "label": pa.array(names)
            if text
            else pa.array([sorted(WNIDS).index(name) for name in names]),
        }
        table = pa.table(columns).replace_schema_metadata(None if text else head)
        name = root / f"train-{number:05d}-of-{files:05d}.parquet"
        pq.write_table(table, name, row_group_size=rows_per_group)
    return root


@pytest.mark.parametrize("text", [False, True])
def test_parquet_keeps_every_byte_and_label(
    folder: Path, tmp_path: Path, text: bool
) -> None:
    made(write_parquet(folder, tmp_path / "hub", text=text), tmp_path)
    found = labels_by_key(tmp_path / "dst")
    assert found == {path.stem: path.parent.name for path in folder.rglob("*.JPEG")}
    stored = {}
    for tar in (tmp_path / "dst").glob("*.tar"):
        with tarfile.open(tar) as archive:
            stored |= {
                member.name: archive.extractfile(member).read() for member in archive
            }  # type: ignore[union-attr]
    for path in folder.rglob("*.JPEG"):
        assert stored[f"{path.stem}.jpg"] == path.read_bytes()
        assert json.loads(stored[f"{path.stem}.json"]) == {
            "filename": path.name,
            "class": path.parent.name,
        }


def test_parquet_by_folder_pattern_and_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    root = write_parquet(folder, tmp_path / "hub" / "data")
    ways = (root.parent, root, f"{root}/train-*.parquet")
    sizes = {str(way): len(open_source(str(way)).listing()) for way in ways}
    assert set(sizes.values()) == {12}
    assert len(open_source(f"{root}/train-00001-of-00002.parquet").listing()) == 6
    (root / "train-00000-of-00002.parquet").rename(
        root / "validation-00000-of-00001.parquet"
    )
    with pytest.raises(
        ConfigError, match=r"files of train, validation.*train-\*\.parquet"
    ):
        open_source(str(root)).listing()


def test_a_shard_reads_few_row_groups(folder: Path, tmp_path: Path) -> None:
    listing = open_source(
        str(write_parquet(folder, tmp_path / "hub", rows_per_group=2))
    ).listing()
    assert listing.locations is not None
    plan = make_plan(listing, ConvertSettings(samples_per_shard=4))
    groups = [
        set(listing.locations[["file", "group"]][part].tolist())
        for part in np.split(plan.order, plan.bounds[1:-1])
    ]
    assert [len(found) for found in groups] == [2, 2, 2]
    assert sorted(plan.order.tolist()) == list(range(12))
    assert plan.order.tolist() != sorted(plan.order.tolist())
    assert (np.diff(plan.order.reshape(-1, 2)) != 1).any(), (
        "a shard is shuffled in itself"
    )
    assert (
        make_plan(listing, ConvertSettings(shuffle_seed=1)).order.tolist()
        != plan.order.tolist()
    )
    assert make_plan(
        listing, ConvertSettings(shuffle_seed=None)
    ).order.tolist() == list(range(12))


def test_rows_without_a_path_or_an_image(folder: Path, tmp_path: Path) -> None:
    images = [path.read_bytes() for path in sorted(folder.rglob("*.JPEG"))[:3]]
    table = pa.table(
        {
            "jpg": pa.array([*images, None], pa.binary()),
            "caption": ["a"] * 4,
            "thumb": [b""] * 4,
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert (
        convert(
            str(tmp_path / "x.parquet"), str(tmp_path / "dst"), FEW, workers=1
        ).num_samples
        == 3
    )
    keys = open_dataset(str(tmp_path / "dst")).keys(np.arange(3))
    assert sorted(keys) == ["x/00000000", "x/00000001", "x/00000002"]
    assert pq.read_table(tmp_path / "dst" / "rejected.parquet").to_pylist() == [
        {"key": "x/00000003", "reason": "empty"}
    ]
    with pytest.raises(
        ConfigError, match=r"no column 'picture' \(--image-column\); it has jpg"
    ):
        open_source(
            str(tmp_path / "x.parquet"),
            SourceSettings(image_column="picture"),
            kind="parquet",
        ).listing()


def test_damaged_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"a\.parquet is damaged, or is not a Parquet"):
        open_source(str(tmp_path / "a.parquet"))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_a_location_is_that_of_its_row(rows_per_group: list[int]) -> None:
    found = file_locations(3, np.array(rows_per_group, np.int64)).tolist()
    assert found == [
        (3, group, row)
        for group, count in enumerate(rows_per_group)
        for row in range(count)
    ]


# -------------------------------------------------------------------------------------------- lists


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_a_list_keeps_names_and_labels(folder: Path, tmp_path: Path, kind: str) -> None:
    paths = sorted(folder.rglob("*.JPEG"))
    names = [
        str(path.relative_to(tmp_path)) if n % 2 else f"file://{path}"
        for n, path in enumerate(paths)
    ]
    table = pa.table(
        {
            "url": [*names, "folder/gone.jpg"],
            "label": [*(p.parent.name for p in paths), WNIDS[0]],
        }
    )
    target = tmp_path / f"list.{kind}"
    if kind == "parquet":
        pq.write_table(table, target)
    else:
        pa_csv.write_csv(
            table, target, pa_csv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        )
    assert made(target, tmp_path).classes == sorted(WNIDS)
    assert {
        key.rsplit("/", 1)[1]: name
        for key, name in labels_by_key(tmp_path / "dst").items()
    } == {path.stem: path.parent.name for path in paths}
    rows = pq.read_table(tmp_path / "dst" / "rejected.parquet").to_pylist()
    assert rows == [{"key": "folder/gone.jpg", "reason": "not found"}]


def test_a_list_keeps_numbers_and_hides_secrets(folder: Path, tmp_path: Path) -> None:
    path = next(folder.rglob("*.JPEG"))
    (tmp_path / "a.csv").write_text(
        f"image,class,size\n{path},7,1000\nhttps://user:pw@127.0.0.1:9/a/b.jpg?sig=secret,3,5\n"
    )
    listing = open_source(str(tmp_path / "a.csv")).listing()
    assert listing.labels.tolist() == [7, 3]
    assert listing.classes is None
    assert listing.sizes.tolist() == [1000, 5]
    assert listing.keys is not None
    about = open_source(str(tmp_path / "a.csv")).about(
        str(listing.names[1]), class_name=None
    )
    for text in (str(listing.keys.to_pylist()), str(about)):
        assert "secret" not in text
        assert "pw" not in text


def test_a_list_opens_nothing_that_is_not_an_image_store(tmp_path: Path) -> None:
    for name in ("pipe:touch canary", "ftp://host/a.jpg", "simplecache::s3://a/b.jpg"):
        (tmp_path / "a.csv").write_text(f"url\n{name}\n")
        with pytest.raises(ConfigError, match="not opened"):
            open_source(str(tmp_path / "a.csv")).listing()
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match="no column of URIs"):
        open_source(str(tmp_path / "a.csv")).listing()


def test_a_list_from_elsewhere_names_no_local_file(tmp_path: Path) -> None:
    from pipeline import storage

    storage.write_atomic("memory://lists/a.csv", b"url\n/etc/passwd\n")
    with pytest.raises(ConfigError, match="a list from elsewhere must not"):
        open_source("memory://lists/a.csv").listing()


# ------------------------------------------------------------------------------------------- shards


def test_shards_made_elsewhere_are_a_source(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import webdataset as wds

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "theirs").mkdir()
    paths = sorted(folder.rglob("*.JPEG"))
    with wds.ShardWriter(
        str(tmp_path / "theirs" / "s-%04d.tar"), maxcount=5, verbose=0
    ) as writer:
        for n, path in enumerate(paths):
            writer.write({"__key__": path.stem, "jpg": path.read_bytes(), "cls": n})
    info = made(tmp_path / "theirs", tmp_path, ConvertSettings(samples_per_shard=6))
    assert (info.num_samples, info.num_shards) == (12, 2)
    dataset = open_dataset(str(tmp_path / "dst"))
    assert dataset.keys(np.arange(12)) == [path.stem for path in paths]
    assert dataset.lookup(np.arange(12)).labels_B.tolist() == list(range(12))


def test_a_folder_of_several_things_is_not_guessed(
    folder: Path, tmp_path: Path
) -> None:
    write_parquet(folder, tmp_path / "mixed")
    (tmp_path / "mixed" / "a.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds images and Parquet files"):
        open_source(str(tmp_path / "mixed"))


# ------------------------------------------------------------------------------------------ listing


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a/b.JPG", None),
        ("a/b.txt", ".txt"),
        ("README", "no extension"),
        (".git/a.jpg", "hidden"),
        ("a/._b.jpg", "hidden"),
        ("__MACOSX/a.jpg", "hidden"),
        ("a/\udcff.jpg", "name is not UTF-8"),
    ],
)
def test_a_name_decides_whether_a_file_is_listed(name: str, reason: str | None) -> None:
    assert why_skipped(name) == reason


def test_a_long_listing_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing_module, "_SAY_EVERY_S", -1.0)
    builder = ListingBuilder("s3://bucket/photos")
    for number in range(2500):
        builder.add(f"{number}.txt", 1)
    assert capsys.readouterr().err.splitlines() == [
        "Listing photos: 1,000 files so far",
        "Listing photos: 2,000 files so far",
    ]
