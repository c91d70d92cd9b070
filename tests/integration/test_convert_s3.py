"""Storage, conversion and reading against a real S3 server on loopback."""

from __future__ import annotations

import gzip
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.errors import DataError, InfrastructureError
from pipeline.storage.retry import BUDGET_VARIABLE
from pipeline.verify import verify
from tests.limits import HANG_S

pytestmark = pytest.mark.remote


def test_the_endpoint_of_the_environment_is_used(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "folder", "a.bin")
    storage.write_atomic(uri, b"hello world")
    assert storage.read_bytes(uri) == b"hello world"
    assert storage.read_bytes(uri, 6, 5) == b"world"
    assert storage.size_of(uri) == 11
    assert storage.exists(uri)
    assert storage.is_folder(storage.join(s3_bucket, "folder"))
    listed = list(storage.list_files(s3_bucket, recursive=True))
    assert [(file.name, file.uri, file.size_bytes) for file in listed] == [
        ("folder/a.bin", uri, 11)
    ]
    assert listed[0].version
    assert list(storage.list_files(s3_bucket)) == []
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_conditional_put_writes_once(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "lease")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_ranges_behind_the_end_are_short_reads(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "a.bin")
    storage.write_atomic(uri, b"hello")
    for start, length in ((3, 10), (50, 10)):
        with pytest.raises(DataError, match="wanted 10 bytes"):
            storage.read_bytes(uri, start, length)


def test_a_large_object_is_read_in_blocks(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "a.bin")
    data = np.random.default_rng(0).bytes(300_000)
    storage.write_atomic(uri, data)
    with storage.open_read(uri, buffer_bytes=65_536) as file:
        assert file.read(10) == data[:10]
        file.seek(200_000)
        assert file.read(5) == data[200_000:200_005]
        file.seek(0)
        assert file.read() == data


def test_what_is_not_there_is_named(s3_bucket: str) -> None:
    for uri in (storage.join(s3_bucket, "none"), "s3://no-such-bucket-here/none"):
        with pytest.raises(DataError, match=f"{uri}.*not found"):
            storage.read_bytes(uri)
        with pytest.raises(DataError, match="not found"):
            open_dataset(uri)


def test_a_wrong_endpoint_is_named(
    s3_server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(BUDGET_VARIABLE, "0")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    try:
        with pytest.raises(
            InfrastructureError, match=r"s3://bucket/x.*AWS_ENDPOINT_URL"
        ):
            storage.read_bytes("s3://bucket/x")
        with pytest.raises(
            InfrastructureError, match=r"s3://bucket/x.*AWS_ENDPOINT_URL"
        ):
            storage.exists("s3://bucket/x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def _read_in_child(uri: str, queue: multiprocessing.Queue[bytes]) -> None:
    queue.put(storage.read_bytes(uri))


def test_a_forked_child_has_connections_of_its_own(s3_bucket: str) -> None:
    uri = storage.join(s3_bucket, "a.bin")
    storage.write_atomic(uri, b"hello")
    assert storage.read_bytes(uri) == b"hello"
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(uri, queue))
    child.start()
    assert queue.get(timeout=HANG_S) == b"hello"
    child.join()
    assert storage.read_bytes(uri) == b"hello"


def test_a_dataset_made_in_s3_is_that_made_locally(
    s3_bucket: str, make_class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_class_folder(num_classes=2, per_class=6, root=tmp_path / "src")
    settings = ConvertSettings(samples_per_shard=4)
    here = convert(str(source), str(tmp_path / "dst"), settings, workers=1)
    there = convert(str(source), storage.join(s3_bucket, "dst"), settings, workers=2)
    assert there == here
    names = {
        file.name: file.uri
        for file in storage.list_files(storage.join(s3_bucket, "dst"), recursive=True)
    }
    assert set(names) == {path.name for path in (tmp_path / "dst").iterdir()}
    for name, uri in names.items():
        assert storage.read_bytes(uri) == (tmp_path / "dst" / name).read_bytes(), name
    assert convert(str(source), storage.join(s3_bucket, "dst"), settings) == here
    manifest = open_dataset(storage.join(s3_bucket, "dst"))
    rows = manifest.lookup(np.array([11, 0, 5]))
    assert (
        rows.labels_B.tolist()
        == open_dataset(str(tmp_path / "dst"))
        .lookup(np.array([11, 0, 5]))
        .labels_B.tolist()
    )
    assert manifest.keys(np.array([0]))
    assert verify(storage.join(s3_bucket, "dst"), full=True).problems == []
    if os.environ.get("AWS_SECRET_ACCESS_KEY"):
        everything = b"".join(storage.read_bytes(uri) for uri in names.values())
        assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in everything


def test_a_source_in_s3_gives_the_same_dataset(
    s3_bucket: str, make_class_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_class_folder(num_classes=2, per_class=3, root=tmp_path / "src")
    for path in source.rglob("*.jpg"):
        storage.put_file(
            path, storage.join(s3_bucket, "src", str(path.relative_to(source)))
        )
    here = convert(str(source), str(tmp_path / "a"), workers=1)
    there = convert(storage.join(s3_bucket, "src"), str(tmp_path / "b"), workers=1)
    assert there == here


def test_tars_in_s3_are_scanned_once(
    s3_bucket: str,
    make_class_folder: Callable[..., Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = make_class_folder(num_classes=2, per_class=3, root=tmp_path / "src")
    made = convert(
        str(source),
        str(tmp_path / "dst"),
        ConvertSettings(samples_per_shard=3),
        workers=1,
    )
    for path in (tmp_path / "dst").glob("*.tar"):
        storage.put_file(path, storage.join(s3_bucket, "tars", path.name))
    uri = storage.join(s3_bucket, "tars")
    first = open_dataset(uri, cache_dir=tmp_path / "cache")
    assert first.info.fingerprint == made.fingerprint
    assert "scanned once" in caplog.text
    caplog.clear()
    assert open_dataset(uri, cache_dir=tmp_path / "cache").info == first.info
    assert not caplog.text


def test_shards_in_s3_are_chosen_by_name_as_on_a_disk(
    s3_bucket: str,
    make_class_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = make_class_folder(num_classes=2, per_class=3, root=tmp_path / "src")
    convert(
        str(source),
        str(tmp_path / "dst"),
        ConvertSettings(samples_per_shard=2),
        workers=1,
    )
    folder = storage.join(s3_bucket, "odd [1]")
    for path in sorted((tmp_path / "dst").glob("*.tar")):
        storage.put_file(path, storage.join(folder, path.name))
        packed = gzip.compress(path.read_bytes())
        storage.write_atomic(
            storage.join(folder, "packed", f"{path.stem}.tar.gz"), packed
        )
    storage.put_file(path, storage.join(folder, "val-000000.tar"))
    storage.write_atomic(storage.join(folder, "._train-000009.tar"), b"\0")
    for pattern, count in (
        ("train-*.tar", 6),
        ("train-{000000..000001}.tar", 4),
        ("train-00000[02].tar", 4),
        ("train-000001.tar", 2),
    ):
        uri = f"{folder}/{pattern}"
        assert open_dataset(uri).info.num_samples == count
        assert verify(uri, full=True).problems == []
        target = storage.join(s3_bucket, f"made-{count}-{len(pattern)}")
        assert convert(uri, target, workers=1).num_samples == count
    names = f"{folder}/train-000001.tar,{folder}/val-000000.tar"
    assert open_dataset(names).info.num_shards == 2
    with pytest.raises(DataError, match="matches no file"):
        open_dataset(f"{folder}/nope-*.tar")
    with pytest.raises(DataError, match=r"splits.*train-\*\.tar"):
        open_dataset(folder)
    for uri in (storage.join(folder, "packed"), f"{folder}/packed/train-*.tar.gz"):
        target = storage.join(s3_bucket, f"unpacked-{len(uri)}")
        assert convert(uri, target, workers=1).num_samples == 6
