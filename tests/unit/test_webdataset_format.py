"""Our tars against other readers, and other people's tars against our scanner."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import storage
from pipeline.errors import DataError
from pipeline.formats.records import ShardIndex
from pipeline.formats.table import FORMATS
from pipeline.formats.tar import TarScanner
from pipeline.formats.tar_writer import make_header
from pipeline.formats.webdataset import split_key
from pipeline.formats.webdataset_index import index_shard
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason, Refused

BLOCK = 512


@pytest.fixture(scope="module")
def crops(photo_paths: dict[str, Path]) -> dict[str, bytes]:
    """Six small crops of photographs in the three formats a shard may hold."""
    found = {}
    kinds = [
        ("JPEG", {}),
        ("PNG", {}),
        ("WEBP", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {}),
        ("PNG", {}),
    ]
    for number, ((stem, path), (kind, options)) in enumerate(
        zip(photo_paths.items(), kinds, strict=False)
    ):
        with Image.open(path) as image:
            crop = image.convert("RGB").crop((5, 5, 45 + number, 37))
        buffer = io.BytesIO()
        crop.save(buffer, kind, **options)
        found[stem] = buffer.getvalue()
    return found


def write(uri: str, images: dict[str, bytes]) -> ShardIndex:
    with WebDatasetWriter(uri) as writer:
        for label, (key, data) in enumerate(images.items()):
            found = probe(data)
            assert isinstance(found, Probe)
            writer.add(
                key,
                data,
                found,
                label=label,
                metadata={"filename": f"{key}.orig", "ü": "é"},
            )
        return writer.close()


def make_tar(members: list[tuple[str, bytes]], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def index_bytes(tmp_path: Path, data: bytes, name: str = "some.tar") -> object:
    path = tmp_path / name
    path.write_bytes(data)
    return index_shard(str(path))


def test_what_is_written_is_what_is_read(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    images = {**crops, "klasse/Ünïcode-" + "langer_name" * 12: crops["astronaut"]}
    path = tmp_path / "a.tar"
    written = write(str(path), images)
    read = index_shard(str(path))
    blob = path.read_bytes()
    assert read.file == written.file
    assert written.file.sha256 == hashlib.sha256(blob).hexdigest()
    assert written.file.size_bytes == len(blob)
    assert read.table.keys == written.table.keys == list(images)
    assert read.dali_index == written.dali_index
    assert not read.ignored
    for row, (key, data) in enumerate(images.items()):
        start = int(read.table.offsets[row])
        assert blob[start : start + int(read.table.sizes[row])] == data, key
        assert int(read.table.hashes[row]) == xxhash.xxh3_64_intdigest(data)
        with Image.open(io.BytesIO(data)) as image:
            assert image.size == (read.table.widths[row], read.table.heights[row])
            assert image.format is not None
            assert image.format.lower() == FORMATS[read.table.formats[row]]
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_the_bytes_depend_on_the_content_alone(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    first = write(str(tmp_path / "a.tar"), crops)
    second = write("memory://webdataset-format/b.tar", crops)
    assert first.file.sha256 == second.file.sha256
    assert (
        storage.read_bytes("memory://webdataset-format/b.tar")
        == (tmp_path / "a.tar").read_bytes()
    )


def test_tarfile_and_webdataset_read_our_tars(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    images = {**crops, "x/" + "n" * 120: crops["coffee"]}
    path = tmp_path / "a.tar"
    write(str(path), images)
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert names[:3] == ["astronaut.jpg", "astronaut.cls", "astronaut.json"]
    samples = list(
        webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    )
    assert [sample["__key__"] for sample in samples] == list(images)
    for label, (sample, data) in enumerate(zip(samples, images.values(), strict=True)):
        assert data in sample.values()
        assert sample["cls"] == str(label).encode()


def test_our_scanner_reads_what_webdataset_writes(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    path = tmp_path / "w.tar"
    with webdataset.TarWriter(str(path)) as writer:
        for label, (key, data) in enumerate(crops.items()):
            writer.write({"__key__": key, "jpg": data, "cls": label, "json": {"a": 1}})
    found = index_shard(str(path))
    assert found.table.keys == list(crops)
    assert found.table.labels.tolist() == list(range(len(crops)))
    blob = path.read_bytes()
    rows = zip(found.table.offsets.tolist(), found.table.sizes.tolist(), strict=True)
    assert [blob[start : start + size] for start, size in rows] == list(crops.values())


def test_dali_reads_our_tar_and_index(tmp_path: Path, crops: dict[str, bytes]) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    # Only JPEGs: DALI takes one list of extensions for a component, and fills it with the first
    # that is there.
    images = {key: data for key, data in crops.items() if data[:2] == b"\xff\xd8"}
    tar, index = tmp_path / "a.tar", tmp_path / "a.idx"
    index.write_bytes(write(str(tar), images).dali_index)

    @pipeline_def(batch_size=len(images), num_threads=1, device_id=None)
    def reader():  # type: ignore[no-untyped-def]
        return tuple(
            fn.readers.webdataset(
                paths=[str(tar)], index_paths=[str(index)], ext=["jpg", "cls"]
            )
        )

    pipe = reader()
    pipe.build()
    encoded, labels = pipe.run()
    assert [bytes(encoded.at(i)) for i in range(len(images))] == list(images.values())
    assert [bytes(labels.at(i)) for i in range(len(images))] == [
        str(i).encode() for i in range(len(images))
    ]


def test_the_dali_index_is_that_of_its_own_tool(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    wds2idx = pytest.importorskip("wds2idx")
    written = write(str(tmp_path / "a.tar"), crops)
    creator = wds2idx.IndexCreator(
        str(tmp_path / "a.tar"), str(tmp_path / "theirs.idx"), verbose=False
    )
    creator.create_index()
    creator.close()
    assert (tmp_path / "theirs.idx").read_bytes() == written.dali_index


@pytest.mark.parametrize(
    "layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_every_layout_of_tar_is_read(
    tmp_path: Path, crops: dict[str, bytes], layout: int
) -> None:
    long = "d" * 60 + "/" + "e" * 60 + "/key"
    members = [
        (f"{key}.JPEG", data)
        for key, data in {"./a": crops["astronaut"], long: crops["rocket"]}.items()
    ]
    found = index_bytes(tmp_path, make_tar(members, format=layout))
    assert found.table.keys == ["./a", long]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------- damage


def test_a_tar_cut_anywhere_is_an_error_or_whole(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    images = dict(list(crops.items())[:4])
    path = tmp_path / "a.tar"
    write(str(path), images)
    blob = path.read_bytes()
    end = blob.rstrip(b"\0")
    last_member_end = len(end) + -len(end) % BLOCK
    cuts = sorted({*range(0, len(blob), BLOCK), *range(7, len(blob), 397)})
    for cut in cuts:
        if cut >= last_member_end + BLOCK:  # only zeros of the end mark are missing
            assert len(index_bytes(tmp_path, blob[:cut]).table) == len(images)  # type: ignore[attr-defined]
            continue
        with pytest.raises(DataError, match=r"some\.tar") as caught:
            index_bytes(tmp_path, blob[:cut])
        text = str(caught.value)
        assert "at byte" in text
        assert "whole members" in text


def test_a_flipped_bit_in_a_header_is_found(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    path = tmp_path / "a.tar"
    written = write(str(path), dict(list(crops.items())[:2]))
    blob = bytearray(path.read_bytes())
    second_header = int(written.table.offsets[1]) - BLOCK
    for at in range(second_header, second_header + BLOCK, 13):
        blob[at] ^= 0x10
        with pytest.raises(DataError, match=r"some\.tar"):
            index_bytes(tmp_path, bytes(blob))
        blob[at] ^= 0x10


def test_a_flipped_bit_in_an_image_changes_the_hashes(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    path = tmp_path / "a.tar"
    written = write(str(path), crops)
    blob = bytearray(path.read_bytes())
    blob[int(written.table.offsets[1]) + 200] ^= 1
    found = index_bytes(tmp_path, bytes(blob))
    assert (found.table.hashes != written.table.hashes).nonzero()[0].tolist() == [1]  # type: ignore[attr-defined]
    assert found.file.sha256 != written.file.sha256  # type: ignore[attr-defined]


@pytest.mark.parametrize("tail", [b"junk", b"\0" * 10_240 + b"x"])
def test_junk_after_the_end_is_an_error(
    tmp_path: Path, crops: dict[str, bytes], tail: bytes
) -> None:
    with pytest.raises(DataError, match="junk"):
        index_bytes(tmp_path, make_tar([("a.jpg", crops["astronaut"])]) + tail)


def test_two_archives_in_one_file_are_an_error(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    one = make_tar([("a.jpg", crops["astronaut"])])
    two = make_tar([("b.jpg", crops["rocket"])])
    with pytest.raises(DataError, match="another archive"):
        index_bytes(tmp_path, one + two)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "not adjacent"),
        (["a.jpg", "x.bin", "a.cls"], "not adjacent"),
        (["a.jpg", "a.jpg"], "two members .jpg"),
        (["a.jpg", "a.JPG"], "two members .jpg"),
        (["a.jpg", "b.cls", "c.jpg"], "'b' has no image"),
        (["README", "a.pyd"], "no sample"),
        (["../a.jpg"], "refused"),
        (["x/../../a.jpg"], "refused"),
        (["/etc/a.jpg"], "refused"),
    ],
)
def test_badly_made_tars_are_errors(
    tmp_path: Path, crops: dict[str, bytes], names: list[str], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        index_bytes(tmp_path, make_tar([(name, crops["astronaut"]) for name in names]))


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    ],
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="refused"):
        index_bytes(tmp_path, buffer.getvalue())


def test_a_pickle_member_is_never_read(tmp_path: Path, crops: dict[str, bytes]) -> None:
    canary = tmp_path / "canary"
    evil = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    found = index_bytes(
        tmp_path,
        make_tar([("a.jpg", crops["rocket"]), ("a.pyd", evil), ("a.cls", evil)]),
    )
    assert found.ignored == {"extension .pyd": 1, "labels that are no class number": 1}  # type: ignore[attr-defined]
    assert found.table.labels.tolist() == [-1]  # type: ignore[attr-defined]
    assert not canary.exists()


def test_foreign_members_are_passed_over_and_counted(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    image = crops["astronaut"]
    members = [
        ("__meta__/x.json", b"{}"),
        ("a.seg.png", image),
        ("a.jpg", image),
        ("a.png", crops["chelsea"]),
    ]
    members += [
        ("b.jpg", b"no image at all"),
        ("b.json", b'{"label": 7}'),
        ("LICENSE", b"text"),
    ]
    found = index_bytes(tmp_path, make_tar(members))
    assert found.table.keys == ["a", "b"]  # type: ignore[attr-defined]
    assert found.table.labels.tolist() == [-1, 7]  # type: ignore[attr-defined]
    assert found.bad == [("b", Refused(Reason.NOT_AN_IMAGE))]  # type: ignore[attr-defined]
    assert found.table.widths.tolist()[1] == 0  # type: ignore[attr-defined]
    expected = {"no key": 2, "extension .seg.png": 1, "further images of a key": 1}
    assert found.ignored == expected  # type: ignore[attr-defined]


# -------------------------------------------------------------------------------------------- names

PART = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=60,
)
NAMES = (
    st.lists(PART, min_size=1, max_size=4)
    .map("/".join)
    .filter(lambda name: ".." not in name.split("/"))
)


@given(name=NAMES, size=st.integers(0, 2**33 - 1))
def test_headers_of_any_name_are_read_by_tarfile(name: str, size: int) -> None:
    header = make_header(name, size)
    assert len(header) % BLOCK == 0
    stream = io.BytesIO(header + bytes(2 * BLOCK))
    with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as archive:
        member = archive.next()
    assert member is not None
    assert (member.name, member.size) == (name.rstrip("/"), size)


@given(
    names=st.lists(NAMES, min_size=1, max_size=4),
    layout=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_any_name_that_tarfile_writes_is_read_back(
    names: list[str], layout: int
) -> None:
    members = [(name, name.encode()) for name in names]
    scanner = TarScanner(io.BytesIO(make_tar(members, format=layout)), shard="x.tar")
    assert [(member.name, scanner.read()) for member in scanner] == members


@given(data=st.binary(max_size=3000))
def test_random_bytes_are_an_error_and_never_a_crash(data: bytes) -> None:
    with pytest.raises(DataError):
        list(TarScanner(io.BytesIO(data.rstrip(b"\0") + b"x"), shard="x.tar"))


@given(name=NAMES)
def test_keys_are_those_of_the_webdataset_library(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    prefix, suffix = base_plus_ext(name)
    assert split_key(name) == (None if prefix is None else (prefix, suffix.lower()))


# --------------------------------------------------------------------------------------- the writer


@pytest.mark.parametrize("key", ["a.b", "a b", "__x__", "", "a\tb"])
def test_keys_that_other_readers_would_lose_are_refused(
    tmp_path: Path, crops: dict[str, bytes], key: str
) -> None:
    found = probe(crops["astronaut"])
    assert isinstance(found, Probe)
    with WebDatasetWriter(str(tmp_path / "a.tar")) as writer, pytest.raises(DataError):
        writer.add(key, crops["astronaut"], found)


def test_a_duplicate_key_is_never_written(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    found = probe(crops["astronaut"])
    assert isinstance(found, Probe)
    with WebDatasetWriter(str(tmp_path / "a.tar")) as writer:
        writer.add("a", crops["astronaut"], found)
        with pytest.raises(DataError, match="unique"):
            writer.add("a", crops["astronaut"], found)


def test_an_abandoned_writer_leaves_nothing(
    tmp_path: Path, crops: dict[str, bytes]
) -> None:
    def fail(make: Callable[[], WebDatasetWriter]) -> None:
        found = probe(crops["astronaut"])
        assert isinstance(found, Probe)
        with make() as writer:
            writer.add("a", crops["astronaut"], found)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail(lambda: WebDatasetWriter(str(tmp_path / "a.tar")))
    assert list(tmp_path.iterdir()) == []
