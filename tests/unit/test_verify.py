"""Verification finds what is wrong, where, and says so in the agreed keys."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.formats.webdataset_index import index_shard
from pipeline.images.decodable import undecodable
from pipeline.images.refused import Reason, Refused
from pipeline.verify import main, verify, write_manifest


@pytest.fixture(scope="module")
def made(
    make_class_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("verify")
    source = make_class_folder(num_classes=3, per_class=4, root=root / "src")
    convert(
        str(source), str(root / "set"), ConvertSettings(samples_per_shard=4), workers=1
    )
    return root / "set"


@pytest.fixture
def dataset(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "set")
    return tmp_path / "set"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_dataset_has_no_problem(dataset: Path, full: bool) -> None:
    found = verify(str(dataset), full=full)
    assert (found.num_samples, found.num_shards, found.problems) == (12, 3, [])


def test_missing_cut_and_foreign_shards_are_found_fast(dataset: Path) -> None:
    (dataset / "train-000000.tar").unlink()
    path = dataset / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    shutil.copy(dataset / "train-000002.tar", dataset / "extra.tar")
    found = {
        problem.shard: problem.problem for problem in verify(str(dataset)).problems
    }
    assert found["train-000000.tar"] == "missing"
    assert "bytes, dataset.json says" in found["train-000001.tar"]
    assert found["extra.tar"] == "not in dataset.json"
    assert len(found) == 3


def test_a_flipped_bit_in_an_image_is_found_by_the_full_check(dataset: Path) -> None:
    table = open_dataset(str(dataset)).shard_table(1)
    flip(dataset / "train-000001.tar", int(table.offsets[2] + table.sizes[2] // 2))
    assert verify(str(dataset)).problems == []
    found = verify(str(dataset), full=True).problems
    assert {problem.shard for problem in found} == {"train-000001.tar"}
    assert any(
        problem.key == table.keys[2] and "xxh3" in problem.problem for problem in found
    )
    assert any("sha256" in problem.problem for problem in found)


def test_a_flipped_bit_in_a_header_is_found_by_the_full_check(dataset: Path) -> None:
    table = open_dataset(str(dataset)).shard_table(0)
    flip(dataset / "train-000000.tar", int(table.offsets[1]) - 512 + 3)
    found = verify(str(dataset), full=True).problems
    assert len(found) == 1
    assert "checksum" in found[0].problem


def test_a_manifest_of_another_dataset_is_found(
    dataset: Path, make_class_folder: Callable[..., Path]
) -> None:
    other_source = make_class_folder(
        num_classes=4, per_class=3, root=dataset.parent / "other"
    )
    convert(
        str(other_source),
        str(dataset.parent / "b"),
        ConvertSettings(samples_per_shard=4),
        workers=1,
    )
    theirs = (dataset.parent / "b" / "manifest.parquet").read_bytes()
    (dataset / "manifest.parquet").write_bytes(theirs)
    description = json.loads((dataset / "dataset.json").read_text())
    description["manifest"][0]["size_bytes"] = len(theirs)
    (dataset / "dataset.json").write_text(json.dumps(description))
    found = verify(str(dataset)).problems
    assert [
        problem.shard for problem in found if "content hash" in problem.problem
    ] == [f"train-00000{n}.tar" for n in range(3)]


def test_the_command_prints_the_agreed_keys(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(dataset), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "num_samples": 12,
        "num_shards": 3,
        "problems": [],
    }
    (dataset / "train-000000.tar").unlink()
    assert main([str(dataset), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == [
        {"shard": "train-000000.tar", "key": "", "problem": "missing"}
    ]
    assert main([str(dataset)]) == 3
    assert "train-000000.tar: missing" in capsys.readouterr().err


def test_no_dataset_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "none")]) == 3
    assert "not found" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--json"]) == 3
    assert "not found" in json.loads(capsys.readouterr().out)["problems"][0]["problem"]


# ------------------------------------------------------------------------------ tars made elsewhere


@pytest.fixture
def tars(dataset: Path, tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    for path in dataset.glob("*.tar"):
        shutil.copy(path, tmp_path / "tars")
    return tmp_path / "tars"


def test_tars_without_a_manifest_open_after_one_scan(
    tars: Path, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = open_dataset(str(tars), cache_dir=tmp_path / "cache")
    assert "scanned once" in caplog.text
    assert first.info.fingerprint == open_dataset(str(made)).info.fingerprint
    caplog.clear()
    open_dataset(str(tars), cache_dir=tmp_path / "cache").shard_table(0)
    assert not caplog.text
    (tars / "train-000002.tar").unlink()
    assert open_dataset(str(tars), cache_dir=tmp_path / "cache").info.num_shards == 2


def test_a_written_manifest_is_the_converters(tars: Path, made: Path) -> None:
    assert write_manifest(str(tars)).problems == []
    for name in ("manifest.parquet", "train-000001.idx"):
        assert (tars / name).read_bytes() == (made / name).read_bytes()
    assert open_dataset(str(tars)).info.shards == open_dataset(str(made)).info.shards
    assert verify(str(tars), full=True).problems == []
    with pytest.raises(ConfigError, match=r"already has dataset\.json"):
        write_manifest(str(tars))


def test_a_damaged_tar_is_told_among_whole_ones(tars: Path, tmp_path: Path) -> None:
    path = tars / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:3000])
    found = verify(str(tars))
    assert (found.num_samples, found.num_shards) == (8, 3)
    assert [problem.shard for problem in found.problems] == ["train-000001.tar"]
    for call in (
        lambda: write_manifest(str(tars)),
        lambda: open_dataset(str(tars), cache_dir=tmp_path / "cache"),
    ):
        with pytest.raises(DataError, match=r"train-000001\.tar.*whole members"):
            call()
    assert not (tars / "dataset.json").exists()


def test_pixels_that_cannot_be_decoded_are_found(made: Path) -> None:
    path = made / "train-000000.tar"
    table = index_shard(str(path)).table
    start, size = int(table.offsets[0]), int(table.sizes[0])
    whole = path.read_bytes()[start : start + size]
    assert undecodable(whole) is None
    assert undecodable(whole[:-2]) == Refused(Reason.TRUNCATED)
    at = whole.index(
        b"\xff\xdb"
    )  # libjpeg has Huffman tables to fall back on, but no quantisation table
    broken = whole[:at] + b"\xff\xfe" + whole[at + 2 :]
    assert undecodable(broken) == Refused(Reason.UNDECODABLE)
