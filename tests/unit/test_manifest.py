"""The manifest: what is written is found again, lazily, and nothing damaged passes."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.dataset import DatasetInfo, Manifest, manifest, open_dataset
from pipeline.dataset import writer as dataset_writer
from pipeline.dataset.info import DATASET_FILE, fingerprint_of, parse_dataset_info
from pipeline.dataset.manifest import diff
from pipeline.dataset.writer import write_dataset
from pipeline.errors import DataError, InfrastructureError
from pipeline.formats.records import ShardFile, ShardIndex
from pipeline.formats.table import FORMATS, MODES, ShardTable, TableBuilder


def make_table(seed: int, rows: int) -> ShardTable:
    rng = np.random.default_rng(seed)
    builder = TableBuilder()
    offset = 512
    for row in range(rows):
        size = int(rng.integers(1000, 100_000))
        builder.add(
            f"klasse_ü/{seed}_{row}",
            offset=offset,
            size=size,
            label=int(rng.integers(-1, 1000)),
            width=int(rng.integers(0, 5000)),
            height=int(rng.integers(0, 5000)),
            image_format=FORMATS[rng.integers(len(FORMATS))],
            mode=MODES[rng.integers(len(MODES))],
            xxh3=int(rng.integers(0, 2**64, dtype=np.uint64)),
        )
        offset += size + 2048
    return builder.build()


def make_shard(
    table: ShardTable, number: int, *, size_bytes: int = 1, sha256: str = ""
) -> ShardIndex:
    name = f"train-{number:06d}.tar"
    return ShardIndex(
        ShardFile.of(table, name=name, size_bytes=size_bytes, sha256=sha256), table
    )


def write(
    uri: str, counts: list[int], **options: int
) -> tuple[DatasetInfo, list[ShardTable]]:
    tables = [make_table(seed, rows) for seed, rows in enumerate(counts)]
    shards = [
        make_shard(
            table,
            s,
            size_bytes=int(table.offsets[-1] + table.sizes[-1]),
            sha256=f"{s:064x}",
        )
        for s, table in enumerate(tables)
    ]
    info = write_dataset(
        uri,
        shards=shards,
        name="train",
        container="webdataset",
        classes=["a", "b"],
        **options,
    )
    return info, tables


@pytest.fixture(params=["local", "memory"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "set")
        if request.param == "local"
        else f"memory://manifest-{tmp_path.name}"
    )


COUNTS = [5, 1, 7, 3, 11]


@pytest.mark.parametrize("shards_per_file", [1, 2, 256])
def test_every_sample_is_found_again(uri: str, shards_per_file: int) -> None:
    info, tables = write(uri, COUNTS, shards_per_file=shards_per_file)
    found = open_dataset(uri)
    assert found.info == info
    assert len(info.manifest) == -(-len(COUNTS) // shards_per_file)
    assert found.shard_sizes.tolist() == COUNTS
    assert found.shard_starts.tolist() == [0, 5, 6, 13, 16, 27]
    ids_B = np.random.default_rng(0).permutation(27)[:20]
    rows = found.lookup(ids_B)
    keys = found.keys(ids_B)
    for b, sample_id in enumerate(ids_B.tolist()):
        s = int(np.searchsorted(np.cumsum(COUNTS), sample_id, side="right"))
        i = sample_id - int(np.sum(COUNTS[:s]))
        assert (rows.shards_B[b], rows.indices_B[b]) == (s, i)
        for name in (
            "offsets",
            "sizes",
            "labels",
            "widths",
            "heights",
            "hashes",
            "formats",
            "modes",
        ):
            assert getattr(rows, f"{name}_B")[b] == getattr(tables[s], name)[i], name
        assert keys[b] == tables[s].keys[i]
    assert [
        column.dtype.name for column in (rows.offsets_B, rows.labels_B, rows.hashes_B)
    ] == [
        "int64",
        "int32",
        "uint64",
    ]
    assert found.shard_uri(2) == storage.join(uri, "train-000002.tar")
    assert found.shard_sha256(2) == f"{2:064x}"
    assert found.shard_bytes(2) == int(tables[2].offsets[-1] + tables[2].sizes[-1])


def test_no_sample_at_all_is_no_error(uri: str) -> None:
    write(uri, COUNTS)
    assert open_dataset(uri).lookup(np.empty(0, np.int64)).offsets_B.shape == (0,)


@pytest.mark.parametrize("ids", [[-1], [27], [0, 99]])
def test_ids_outside_the_dataset_are_errors(uri: str, ids: list[int]) -> None:
    write(uri, COUNTS)
    with pytest.raises(DataError, match="samples 0 to 26"):
        open_dataset(uri).lookup(np.array(ids))


def test_only_the_shards_in_use_stay_in_memory(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_CACHED_ROWS", 12)
    monkeypatch.setattr(manifest, "_OPEN_FILES", 1)
    _, tables = write(uri, COUNTS, shards_per_file=2)
    found = open_dataset(uri)
    for s in [0, 1, 2, 3, 4, 0, 4, 2]:
        assert found.shard_table(s).keys == tables[s].keys
        assert (
            sum(len(table) for table in found._tables.values())
            == found._cached_rows
            <= 12
        )
        assert len(found._files) == 1


def test_many_threads_may_ask_at_once(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_CACHED_ROWS", 8)
    monkeypatch.setattr(manifest, "_OPEN_FILES", 1)
    _, tables = write(uri, COUNTS, shards_per_file=2)
    found = open_dataset(uri)
    whole = np.concatenate([table.hashes for table in tables])

    def ask(seed: int) -> bool:
        ids_B = np.random.default_rng(seed).integers(0, 27, 16)
        return bool(np.array_equal(found.lookup(ids_B).hashes_B, whole[ids_B]))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(64)))


def test_a_manifest_may_be_sent_to_another_process(uri: str) -> None:
    write(uri, COUNTS)
    found = open_dataset(uri)
    found.shard_table(0)
    again = pickle.loads(pickle.dumps(found))
    assert again.info == found.info
    assert again.shard_table(3).keys == found.shard_table(3).keys


# ------------------------------------------------------------------------------------------- hashes


def test_the_content_hash_knows_every_column_but_the_place() -> None:
    table = make_table(0, 4)
    base = table.content_hash()
    fields = {
        name: getattr(table, name)
        for name in ("offsets", "sizes", "labels", "widths", "heights", "hashes")
    }
    for name, values in fields.items():
        changed = values.copy()
        changed[2] += 1
        other = ShardTable(
            **{**fields, name: changed},
            formats=table.formats,
            modes=table.modes,
            key_source=table.keys,
        )
        assert (other.content_hash() == base) == (name in ("offsets", "sizes")), name
    renamed = ShardTable(
        **fields,
        formats=table.formats,
        modes=table.modes,
        key_source=[*table.keys[:3], "other"],
    )
    assert renamed.content_hash() != base


def test_the_content_hash_is_pinned() -> None:
    builder = TableBuilder()
    builder.add(
        "a/b",
        offset=512,
        size=10,
        label=3,
        width=4,
        height=5,
        image_format="jpeg",
        mode="RGB",
        xxh3=6,
    )
    builder.add("ü", offset=2048, size=10, xxh3=2**64 - 1)
    assert builder.build().content_hash() == "db8adbda1850f7f6c5358ee0e8393bc5"
    assert (
        fingerprint_of(["a", "b"])
        == "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2"
    )


def test_diff_names_the_shards() -> None:
    first, _ = write("memory://manifest-diff/a", [3, 4, 5])
    tables = [make_table(0, 3), make_table(9, 4)]
    shards = [make_shard(table, s) for s, table in enumerate(tables)]
    shards.append(make_shard(make_table(7, 1), 7))
    second = write_dataset(
        "memory://manifest-diff/b", shards=shards, name="x", container="ffcv"
    )
    assert diff(first, second) == [
        "train-000001.tar",
        "train-000002.tar",
        "train-000007.tar",
    ]
    assert diff(first, first) == []


# ------------------------------------------------------------------------------------------- damage


def test_a_folder_without_a_dataset_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        open_dataset(str(tmp_path / "none"))
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 \.jpg.*pipeline\.convert"):
        open_dataset(str(tmp_path))


def test_an_unfinished_conversion_is_no_dataset(tmp_path: Path) -> None:
    (tmp_path / "_plan.json").write_text("{}")
    (tmp_path / "train-000000.tar").write_bytes(b"half")
    with pytest.raises(DataError, match=r"not finished.*same pipeline\.convert"):
        open_dataset(str(tmp_path))


def edit_description(folder: Path, change: Callable[[dict], None]) -> None:
    data = json.loads((folder / DATASET_FILE).read_text())
    change(data)
    (folder / DATASET_FILE).write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(num_samples=28), "num_samples is given as 28"),
        (lambda data: data.update(num_shards=4), "num_shards"),
        (lambda data: data["shards"]["num_samples"].__setitem__(0, 6), "num_samples"),
        (
            lambda data: data["shards"]["content_hash"].__setitem__(0, "x"),
            "fingerprint",
        ),
        (lambda data: data["shards"]["name"].pop(), "num_samples is not a list of 4"),
        (
            lambda data: data["shards"]["name"].__setitem__(0, "../x.tar"),
            "plain file name",
        ),
        (lambda data: data["shards"]["size_bytes"].__setitem__(0, "12"), "not int"),
        (lambda data: data.pop("fingerprint"), "KeyError"),
        (lambda data: data.update(format_version=99), "format_version is 99"),
        (lambda data: data["manifest"][0].update(first_shard=1), "starts at shard 1"),
        (lambda data: data["manifest"].clear(), "shards listed in manifest"),
    ],
)
def test_a_description_that_disagrees_with_itself_is_an_error(
    tmp_path: Path, change: Callable[[dict], None], message: str
) -> None:
    write(str(tmp_path), COUNTS)
    edit_description(tmp_path, change)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(str(tmp_path))
    assert "dataset.json" in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"null"])
def test_a_description_that_is_no_json_is_an_error(text: bytes) -> None:
    with pytest.raises(DataError, match="here: not a dataset"):
        parse_dataset_info(text, where="here")


def test_a_cut_or_flipped_manifest_is_an_error(tmp_path: Path) -> None:
    write(str(tmp_path), [40, 40])
    path = tmp_path / "manifest.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"manifest\.parquet has .* bytes"):
        open_dataset(str(tmp_path)).shard_table(0)
    found = 0
    for at in range(4, len(whole) - 8, 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        opened = open_dataset(str(tmp_path))
        try:
            hashes = [opened.shard_table(s).content_hash() for s in range(2)]
        except DataError as error:
            assert "manifest" in str(error)  # noqa: PT017
            found += 1
        else:
            # A bit that nothing depends on may flip; what is read must still be right.
            assert hashes == opened.info.shards.columns["content_hash"]
    assert found > 10


def test_a_manifest_of_other_counts_is_an_error(tmp_path: Path) -> None:
    write(str(tmp_path), [3, 4])

    def swap(data: dict) -> None:
        data["shards"]["num_samples"] = [4, 3]

    edit_description(tmp_path, swap)
    with pytest.raises(DataError, match="has 3 rows"):
        open_dataset(str(tmp_path)).shard_table(0)


def test_the_description_is_written_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    put, write_atomic = storage.put_file, storage.write_atomic
    monkeypatch.setattr(
        storage, "put_file", lambda local, uri: (order.append(uri), put(local, uri))
    )
    monkeypatch.setattr(
        storage,
        "write_atomic",
        lambda uri, data: (order.append(uri), write_atomic(uri, data)),
    )
    write(str(tmp_path), COUNTS, shards_per_file=2)
    assert [storage.name_of(uri) for uri in order] == [
        f"manifest-{n:05d}.parquet" for n in range(3)
    ] + [DATASET_FILE]


def test_a_dataset_without_shards_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shard"):
        write_dataset(str(tmp_path / "x"), shards=[], name="x", container="webdataset")
    assert not (tmp_path / "x" / DATASET_FILE).exists()


def test_the_description_of_a_hundred_thousand_shards_is_read_as_columns() -> None:
    assert dataset_writer.SHARDS_PER_FILE * 8 <= 4096
    count = 100_000
    shards = {
        "name": [f"train-{s:06d}.tar" for s in range(count)],
        "num_samples": [10] * count,
        "size_bytes": [1000] * count,
        "sha256": [f"{s:064x}" for s in range(count)],
        "content_hash": [f"{s:032x}" for s in range(count)],
    }
    files = [
        {
            "name": f"m-{n}",
            "first_shard": n,
            "num_shards": min(256, count - n),
            "size_bytes": 1,
        }
        for n in range(0, count, 256)
    ]
    data = {
        "name": "x",
        "format": "webdataset",
        "format_version": 1,
        "num_samples": count * 10,
        "num_shards": count,
        "classes": None,
        "made_by": {},
        "versions": {},
        "fingerprint": fingerprint_of(shards["content_hash"]),
        "manifest": files,
        "shards": shards,
    }
    info = parse_dataset_info(json.dumps(data).encode(), where="here")
    found = Manifest("memory://nowhere", info)
    assert found.locate(np.array([999_999, 10]))[0].tolist() == [99_999, 1]
    assert info.shards[-1].name == "train-099999.tar"


def test_a_cache_that_cannot_be_written_is_named_with_both_remedies(
    make_dataset: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make_dataset()
    for name in ("dataset.json", "manifest.parquet"):
        (Path(uri) / name).unlink()
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "file", Path("/proc/none"), Path("/dev/null")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        with pytest.raises(InfrastructureError) as caught:
            open_dataset(uri)
        assert "XDG_CACHE_HOME" in str(caught.value)
        assert f"pipeline.verify {uri} --write-manifest" in str(caught.value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert open_dataset(uri).info.num_samples > 0
