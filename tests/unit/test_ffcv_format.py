"""Betons: the same samples as in tars, byte for byte, there and back; and what a damaged or foreign
one is met with."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.convert.__main__ import main as convert_main
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.errors import DataError
from pipeline.formats import beton
from pipeline.formats.beton_index import index_shard, read_metas
from pipeline.formats.beton_writer import BetonWriter
from pipeline.formats.records import suffix_of
from pipeline.formats.table import FORMATS
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason
from pipeline.verify import verify, write_manifest

FEW = {"samples_per_shard": 5}


@pytest.fixture
def source(make_class_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_class_folder(num_classes=3, per_class=4, root=tmp_path / "src")


def make(source: Path | str, target: Path, **settings: object) -> Path:
    convert(str(source), str(target), ConvertSettings(**settings), workers=1)
    return target


def files(folder: Path, ending: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"*{ending}"))}


def write(path: Path, images: list[bytes], **settings: object) -> Path:
    with BetonWriter(str(path), **settings) as writer:
        for number, image in enumerate(images):
            writer.add(
                f"{number:03d}",
                image,
                probe(image),
                label=number,
                metadata={"filename": f"ä {number}.jpg"},
            )
        writer.close()
    return path


# ----------------------------------------------------------------------------------- there and back


def test_a_beton_dataset_is_the_tar_dataset(source: Path, tmp_path: Path) -> None:
    tars = open_dataset(str(make(source, tmp_path / "tars", **FEW)))
    betons = open_dataset(str(make(source, tmp_path / "betons", format="ffcv", **FEW)))
    assert betons.info.format == "ffcv"
    assert betons.info.fingerprint == tars.info.fingerprint
    assert [shard.content_hash for shard in betons.info.shards] == [
        shard.content_hash for shard in tars.info.shards
    ]
    assert betons.info.classes == tars.info.classes
    ids = np.arange(12)
    assert betons.keys(ids) == tars.keys(ids)
    assert betons.lookup(ids).labels_B.tolist() == tars.lookup(ids).labels_B.tolist()
    names = {path.name for path in (tmp_path / "betons").iterdir()}
    assert names == {
        *(f"train-00000{n}.beton" for n in range(3)),
        "dataset.json",
        "manifest.parquet",
    }
    for key, row in zip(betons.keys(ids), range(12), strict=True):
        rows = betons.lookup(np.array([row]))
        data = (
            tmp_path / "betons" / betons.shard_name(int(rows.shards_B[0]))
        ).read_bytes()
        stored = data[rows.offsets_B[0] : rows.offsets_B[0] + rows.sizes_B[0]]
        assert stored == (source / f"{key}.jpg").read_bytes()


def test_conversion_between_containers_keeps_every_byte(
    source: Path, tmp_path: Path
) -> None:
    tars = make(source, tmp_path / "tars", **FEW)
    betons = make(source, tmp_path / "betons", format="ffcv", **FEW)
    assert files(make(betons, tmp_path / "tars-again"), ".tar") == files(tars, ".tar")
    assert files(tmp_path / "tars-again", ".idx") == files(tars, ".idx")
    assert files(
        make(tars, tmp_path / "betons-again", format="ffcv"), ".beton"
    ) == files(betons, ".beton")


def test_a_dataset_may_be_cut_into_other_shards_or_lose_its_labels(
    source: Path, tmp_path: Path
) -> None:
    tars = make(source, tmp_path / "tars", **FEW)
    other = open_dataset(
        str(
            make(
                tars,
                tmp_path / "other",
                format="ffcv",
                samples_per_shard=7,
                labels="none",
            )
        )
    )
    assert other.shard_sizes.tolist() == [7, 5]
    assert other.keys(np.arange(12)) == open_dataset(str(tars)).keys(np.arange(12))
    assert set(other.lookup(np.arange(12)).labels_B.tolist()) == {-1}
    few = open_dataset(str(make(tars, tmp_path / "few", format="ffcv", limit=6)))
    assert few.shard_sizes.tolist() == [5, 1]


def test_the_bytes_depend_on_the_samples_alone(source: Path, tmp_path: Path) -> None:
    settings = {
        "format": "ffcv",
        "samples_per_shard": 4,
        "write_mode": "smart",
        "resize": 40,
    }
    alone = make(source, tmp_path / "alone", **settings)
    convert(
        str(source), str(tmp_path / "together"), ConvertSettings(**settings), workers=2
    )
    assert files(alone, "") == files(tmp_path / "together", "")


# --------------------------------------------------------------------------------------- raw pixels


def test_raw_mode_stores_the_pixels(source: Path, tmp_path: Path) -> None:
    folder = make(source, tmp_path / "raw", format="ffcv", write_mode="raw")
    manifest = open_dataset(str(folder))
    table = manifest.shard_table(0)
    data = (folder / "train-000000.beton").read_bytes()
    for row, key in enumerate(table.keys):
        with Image.open(source / f"{key}.jpg") as image:
            expected = np.asarray(image.convert("RGB"))
        assert FORMATS[table.formats[row]] == "raw"
        assert (table.heights[row], table.widths[row]) == expected.shape[:2]
        start = table.offsets[row]
        assert data[start : start + table.sizes[row]] == expected.tobytes()
    assert not verify(str(folder), full=True).problems
    # Back to files: PNG, and from there the same raw betons.
    tars = make(folder, tmp_path / "png")
    assert {
        FORMATS[code] for code in open_dataset(str(tars)).shard_table(0).formats
    } == {"png"}
    again = make(tars, tmp_path / "again", format="ffcv", write_mode="raw")
    assert files(again, ".beton") == files(folder, ".beton")


def test_smart_mode_stores_small_images_raw(source: Path, tmp_path: Path) -> None:
    limit = 64 * 80 * 3
    folder = make(
        source,
        tmp_path / "smart",
        format="ffcv",
        write_mode="smart",
        smart_threshold_bytes=limit,
    )
    table = open_dataset(str(folder)).shard_table(0)
    small = table.widths * table.heights * 3 <= limit
    assert 0 < small.sum() < len(small)
    assert [FORMATS[code] == "raw" for code in table.formats] == small.tolist()
    assert not verify(str(folder), full=True).problems


@pytest.mark.parametrize("write_mode", ["jpg", "raw"])
def test_the_longer_side_can_be_limited(
    source: Path, tmp_path: Path, write_mode: str
) -> None:
    folder = make(
        source,
        tmp_path / "small",
        format="ffcv",
        write_mode=write_mode,
        max_resolution=50,
    )
    table = open_dataset(str(folder)).shard_table(0)
    assert set(np.maximum(table.widths, table.heights)) == {50}
    assert not verify(str(folder), full=True).problems


def test_what_ffcv_cannot_read_is_left_out_and_named(
    tmp_path: Path, photos: dict[str, bytes]
) -> None:
    (tmp_path / "src").mkdir()
    image = Image.open(io.BytesIO(photos["chelsea"])).crop((0, 0, 64, 48))
    image.save(tmp_path / "src" / "a.png")
    image.convert("CMYK").save(tmp_path / "src" / "b.jpg")
    image.convert("L").save(tmp_path / "src" / "c.jpg")
    image.save(tmp_path / "src" / "d.jpg")
    as_they_are = open_dataset(
        str(make(tmp_path / "src", tmp_path / "jpg", format="ffcv"))
    )
    assert sorted(as_they_are.keys(np.arange(2))) == ["c", "d"]
    assert as_they_are.info.num_samples == 2
    resized = open_dataset(
        str(make(tmp_path / "src", tmp_path / "resized", format="ffcv", resize=40))
    )
    assert resized.info.num_samples == 4
    raw = open_dataset(
        str(make(tmp_path / "src", tmp_path / "raw", format="ffcv", write_mode="raw"))
    )
    assert raw.info.num_samples == 4


def test_settings_of_betons_are_refused_for_tars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        convert_main([str(tmp_path), str(tmp_path / "x"), "--write-mode", "raw"]) == 2
    )
    assert "write_mode 'raw' is for the format ffcv" in capsys.readouterr().err
    assert (
        convert_main(
            [
                str(tmp_path),
                str(tmp_path / "x"),
                "--format",
                "ffcv",
                "--smart-threshold",
                "big",
            ]
        )
        == 2
    )
    assert "--smart-threshold 'big': is not a valid size" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- layout


def test_a_sample_lies_in_one_page_and_large_ones_make_pages_larger(
    tmp_path: Path, crops: list[bytes]
) -> None:
    small = write(tmp_path / "small.beton", crops[:3])
    assert np.fromfile(small, beton.HEADER, 1)["page_size"] == 2**23
    pixels = np.arange(1000 * 900 * 3, dtype=np.uint32).astype(
        np.uint8
    )  # 2.7 MB: more than the smallest page
    with BetonWriter(str(tmp_path / "large.beton"), page_bytes=2**21) as writer:
        for number in range(4):
            writer.add(str(number), pixels.tobytes(), Probe("raw", 1000, 900, "RGB"))
            writer.add(f"{number}-small", crops[0], probe(crops[0]))
        table = writer.close().table
    page = int(np.fromfile(tmp_path / "large.beton", beton.HEADER, 1)["page_size"][0])
    assert page == 2**22
    assert (table.offsets // page == (table.offsets + table.sizes - 1) // page).all()
    found = index_shard(str(tmp_path / "large.beton"))
    assert found.table.content_hash() == table.content_hash()
    assert found.table.offsets.tolist() == table.offsets.tolist()


def test_what_is_known_of_an_image_comes_back(
    tmp_path: Path, crops: list[bytes]
) -> None:
    path = write(tmp_path / "a.beton", crops[:3])
    found = index_shard(str(path))
    assert found.table.keys == ["000", "001", "002"]
    assert found.table.labels.tolist() == [0, 1, 2]
    assert read_metas(str(path)) == [
        {"filename": f"ä {number}.jpg"} for number in range(3)
    ]
    with BetonWriter(str(tmp_path / "b.beton")) as writer:
        writer.add("k", crops[0], probe(crops[0]))
        writer.close()
    assert read_metas(str(tmp_path / "b.beton")) == [None]


def test_the_writer_refuses_what_cannot_be_read_back(
    tmp_path: Path, crops: list[bytes]
) -> None:
    png = io.BytesIO()
    Image.open(io.BytesIO(crops[0])).save(png, "PNG")
    with BetonWriter(str(tmp_path / "a.beton")) as writer:
        writer.add("k", crops[0], probe(crops[0]))
        with pytest.raises(DataError, match=r"'k' is already in a\.beton"):
            writer.add("k", crops[1], probe(crops[1]))
        with pytest.raises(DataError, match="holds JPEG or raw pixels; re-encode it"):
            writer.add("p", png.getvalue(), probe(png.getvalue()))
        with pytest.raises(ValueError, match="are not 2 x 3 x 3 pixels"):
            writer.add("r", bytes(17), Probe("raw", 3, 2, "RGB"))
        with pytest.raises(DataError, match="cannot be stored in a beton"):
            writer.add("w", bytes(70_000 * 3), Probe("raw", 70_000, 1, "RGB"))
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------- other people's


def foreign(
    path: Path, crops: list[bytes], fields: tuple[tuple[str, int], ...]
) -> Path:
    """Write a beton as another program might: fields of any names and kinds, samples out of order
    in the file."""
    page, count = 2**21, len(crops)
    dtype = beton.row_dtype([kind for _, kind in fields])
    rows = np.zeros(count, dtype)
    pages, allocations, at = b"", [], page
    for i in reversed(range(count)):
        for number, (_, kind) in enumerate(fields):
            column = dtype.names[number]
            if kind == beton.IMAGE:
                width, height = Image.open(io.BytesIO(crops[i])).size
                rows[column][i] = (beton.MODE_JPEG, width, height, at)
            elif kind == beton.BYTES:
                rows[column][i] = (at, len(b"name%d" % i))
            else:
                rows[column][i] = 10 * i + number
                continue
            data = crops[i] if kind == beton.IMAGE else b"name%d" % i
            allocations.append((i, at, len(data)))
            pages, at = pages + data, at + len(data)
    header = np.zeros(1, beton.HEADER)
    header[0] = (beton.VERSION, len(fields), page, count, 2 * page)
    head = header.tobytes() + beton.describe_fields(fields).tobytes() + rows.tobytes()
    table = np.array(allocations, beton.ALLOCATION).tobytes()
    path.write_bytes(head.ljust(page, b"\0") + pages.ljust(page, b"\0") + table)
    return path


def test_betons_made_elsewhere_are_read(tmp_path: Path, crops: list[bytes]) -> None:
    fields = (
        ("weight", 0),
        ("label", beton.INT),
        ("image", beton.IMAGE),
        ("other", beton.INT),
    )
    found = index_shard(
        str(foreign(tmp_path / "some file.v1.beton", crops[:4], fields))
    )
    assert found.table.keys == [f"some_file_v1/{n:08d}" for n in range(4)]
    assert found.table.labels.tolist() == [1, 11, 21, 31]
    assert found.ignored == {"field 'weight'": 1, "field 'other'": 1}
    assert [
        tuple(pair)
        for pair in zip(found.table.widths, found.table.heights, strict=True)
    ] == [Image.open(io.BytesIO(image)).size for image in crops[:4]]
    named = index_shard(
        str(
            foreign(
                tmp_path / "b.beton", crops[:4], (("image", 2), ("id", beton.BYTES))
            )
        )
    )
    assert named.table.keys == ["name0", "name1", "name2", "name3"]
    assert named.table.labels.tolist() == [-1] * 4


def test_a_folder_of_betons_is_a_dataset(tmp_path: Path, crops: list[bytes]) -> None:
    folder = tmp_path / "betons"
    folder.mkdir()
    for name in ("a", "b"):
        foreign(folder / f"{name}.beton", crops[:4], (("image", 2), ("class", 1)))
    manifest = open_dataset(str(folder), cache_dir=tmp_path / "cache")
    assert (manifest.info.format, manifest.info.num_samples) == ("ffcv", 8)
    assert not verify(str(folder)).problems
    assert write_manifest(str(folder)).num_samples == 8
    assert not verify(
        str(folder), full=True
    ).problems  # out of order in the file is no fault
    tars = open_dataset(str(make(folder, tmp_path / "tars")))
    assert tars.info.fingerprint == open_dataset(str(folder)).info.fingerprint
    (folder / "c.tar").write_bytes(b"")
    (folder / "dataset.json").unlink()
    with pytest.raises(
        DataError, match=r"shards of several containers \(ffcv, webdataset\)"
    ):
        open_dataset(str(folder), cache_dir=tmp_path / "cache2")


def test_a_beton_that_lies_about_an_image_has_a_bad_sample(
    tmp_path: Path, crops: list[bytes]
) -> None:
    path = write(tmp_path / "a.beton", crops[:3])
    data = bytearray(path.read_bytes())
    row = beton.row_dtype([kind for _, kind in beton.OUR_FIELDS])
    start = beton.HEADER.itemsize + 3 * beton.FIELD.itemsize + row.itemsize
    data[start + 1] ^= 1  # the second sample's width
    path.write_bytes(data)
    found = index_shard(str(path))
    assert [(key, refused.reason) for key, refused in found.bad] == [
        ("001", Reason.SIZE_DIFFERS)
    ]
    assert "the beton says" in found.bad[0][1].detail
    assert [FORMATS[code] for code in found.table.formats] == ["jpeg", "bad", "jpeg"]


@pytest.mark.parametrize("keep", [10, 3000, 2**23 - 5, 2**23 + 100, -1, -24])
def test_a_cut_beton_is_told(tmp_path: Path, crops: list[bytes], keep: int) -> None:
    path = write(tmp_path / "a.beton", crops[:3])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"a\.beton"):
        index_shard(str(path))


def test_what_is_no_beton_is_refused(tmp_path: Path, crops: list[bytes]) -> None:
    (tmp_path / "x.beton").write_bytes(b"\x89PNG" * 1000)
    with pytest.raises(DataError, match="not a beton of version 2"):
        index_shard(str(tmp_path / "x.beton"))
    unfinished = bytearray(write(tmp_path / "y.beton", crops[:1]).read_bytes())
    unfinished[16:24] = bytes(8)  # FFCV's writer fills this in last
    (tmp_path / "y.beton").write_bytes(unfinished)
    with pytest.raises(DataError, match="cut or was never finished"):
        index_shard(str(tmp_path / "y.beton"))
    custom = bytearray(write(tmp_path / "z.beton", crops[:1]).read_bytes())
    custom[beton.HEADER.itemsize] = 255
    (tmp_path / "z.beton").write_bytes(custom)
    with pytest.raises(DataError, match="field 'image' is of a custom kind"):
        index_shard(str(tmp_path / "z.beton"))
    with pytest.raises(DataError, match="no image field"):
        index_shard(
            str(
                foreign(
                    tmp_path / "w.beton",
                    crops[:1],
                    (("label", beton.INT), ("id", beton.BYTES)),
                )
            )
        )
    with pytest.raises(DataError, match="the format 'zarr' is not one of"):
        suffix_of("zarr")


def test_verification_finds_a_changed_image_in_a_beton(
    source: Path, tmp_path: Path
) -> None:
    folder = make(source, tmp_path / "betons", format="ffcv", **FEW)
    table = open_dataset(str(folder)).shard_table(1)
    path = folder / "train-000001.beton"
    data = bytearray(path.read_bytes())
    data[int(table.offsets[2] + table.sizes[2] // 2)] ^= 0xFF
    path.write_bytes(data)
    assert not verify(str(folder)).problems
    problems = verify(str(folder), full=True).problems
    assert {problem.shard for problem in problems} == {path.name}
    assert {problem.key for problem in problems} == {"", table.keys[2]}


def test_the_command_line_makes_betons(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [
        str(source),
        str(tmp_path / "b"),
        "--format",
        "ffcv",
        "--max-resolution",
        "60",
        "--json",
        "--workers",
        "1",
    ]
    assert convert_main(args) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["num_samples"] == 12
    assert (
        open_dataset(str(tmp_path / "b")).info.made_by["plan"]["settings"][
            "max_resolution"
        ]
        == 60
    )
