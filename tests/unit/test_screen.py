"""The header probe against Pillow, on real photographs in every format, whole, cut and forged."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import LoaderConfig
from pipeline.errors import DataError
from pipeline.images.header import (
    DEFAULT_LIMITS,
    Probe,
    ScreenLimits,
    probe,
    screen,
)
from pipeline.images.refused import Reason, Refused
from pipeline.loader.data_report import DataReport

EMPTY = Refused(Reason.EMPTY)
NOT_AN_IMAGE = Refused(Reason.NOT_AN_IMAGE)
TRUNCATED = Refused(Reason.TRUNCATED)
TOO_MANY_PIXELS = Refused(Reason.TOO_MANY_PIXELS)
TOO_MANY_BYTES = Refused(Reason.TOO_MANY_BYTES)
ASPECT = Refused(Reason.ASPECT)


@pytest.fixture(scope="module")
def crop(photo_paths: dict[str, Path]) -> Image.Image:
    with Image.open(photo_paths["astronaut"]) as image:
        return image.convert("RGB").crop((100, 50, 161, 93))


CASES = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"subsampling": 0, "comment": b"\xff\xd9 in a comment"}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "I;16", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {"exact": True}),
    ("WEBP", "RGBA", {"lossless": True, "exact": True}),
    ("GIF", "P", {}),
    ("BMP", "RGB", {}),
    ("BMP", "P", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "L", {}),
    ("TIFF", "CMYK", {}),
    ("TIFF", "I;16", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "RGB", {"compression": "tiff_adobe_deflate"}),
]


def encode(image: Image.Image, kind: str, mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if mode == "I;16":
        converted = image.convert("I").convert("I;16")
    else:
        converted = image.convert(mode)
        if mode in ("RGBA", "LA"):
            converted.putalpha(120)
    converted.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("kind", "mode", "options"), CASES)
def test_the_probe_agrees_with_pillow(
    crop: Image.Image, kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encode(crop, kind, mode, **options)
    found = probe(data)
    assert isinstance(found, Probe)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format is not None
        assert (found.format, (found.width, found.height)) == (
            image.format.lower(),
            image.size,
        )
    assert found.mode == mode
    assert found.progressive == bool(options.get("progressive"))
    assert not found.animated


@pytest.mark.parametrize(("kind", "mode", "options"), CASES)
def test_a_cut_image_is_never_whole(
    crop: Image.Image, kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encode(crop, kind, mode, **options)
    for length in [*range(1, 64), len(data) // 2, len(data) - 20, len(data) - 1]:
        assert probe(data[:length]) in (TRUNCATED, NOT_AN_IMAGE), length


def test_every_photograph_is_read_as_pillow_reads_it(
    photo_paths: dict[str, Path],
) -> None:
    for path in photo_paths.values():
        found = probe(path.read_bytes())
        with Image.open(path) as image:
            assert isinstance(found, Probe)
            assert (found.width, found.height) == image.size
            assert found.mode == image.mode


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_is_told_and_not_applied(
    crop: Image.Image, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "maker"
    for order in ("II", "MM"):
        exif.endian = "<" if order == "II" else ">"
        found = probe(encode(crop, "JPEG", "RGB", exif=exif.tobytes()))
        assert isinstance(found, Probe)
        assert (found.width, found.height, found.orientation) == (
            *crop.size,
            orientation,
        )


def test_trailing_bytes_do_not_hide_the_end(crop: Image.Image) -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        assert isinstance(probe(encode(crop, kind, "RGB") + b"\n\0\0trailing"), Probe)


def test_a_thumbnails_end_is_not_the_images(crop: Image.Image) -> None:
    thumbnail = encode(crop.resize((16, 16)), "JPEG", "RGB")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    data = encode(crop, "JPEG", "RGB")
    assert isinstance(probe(data[:2] + segment + data[2:]), Probe)
    assert probe(data[:2] + segment + data[2:-2]) == TRUNCATED


def test_animations_are_told(crop: Image.Image) -> None:
    frames = [crop, crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for kind in ("GIF", "WEBP", "PNG"):
        found = probe(
            encode(frames[0], kind, "RGB", save_all=True, append_images=frames[1:])
        )
        assert isinstance(found, Probe)
        assert found.animated
        assert (found.width, found.height) == crop.size


def png_that_declares(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_that_declares(crop: Image.Image, width: int, height: int) -> bytes:
    data = encode(crop, "JPEG", "RGB")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def test_bombs_are_refused_by_their_header(crop: Image.Image) -> None:
    assert screen(png_that_declares(30_000, 30_000)) == TOO_MANY_PIXELS
    assert screen(jpeg_that_declares(crop, 20_000, 20_000)) == TOO_MANY_PIXELS
    assert isinstance(screen(jpeg_that_declares(crop, 10_000, 10_000)), Probe)


def test_each_limit_has_its_reason(crop: Image.Image) -> None:
    data = encode(crop, "JPEG", "RGB")
    assert isinstance(
        screen(data, ScreenLimits(max_pixels=61 * 43, max_bytes=len(data))), Probe
    )
    assert screen(data, ScreenLimits(max_pixels=61 * 43 - 1)) == TOO_MANY_PIXELS
    assert screen(data, ScreenLimits(max_bytes=len(data) - 1)) == TOO_MANY_BYTES
    assert screen(png_that_declares(1001, 10)) == ASPECT
    assert isinstance(screen(png_that_declares(1000, 10)), Probe)
    assert screen(b"") == EMPTY
    assert screen(png_that_declares(0, 10)) == NOT_AN_IMAGE


def test_the_limits_are_the_loaders() -> None:
    loader = LoaderConfig()
    assert (DEFAULT_LIMITS.max_pixels, DEFAULT_LIMITS.max_bytes) == (
        loader.max_pixels,
        loader.max_bytes,
    )


@pytest.mark.parametrize(
    "data",
    [
        b"hello",
        b"<html>",
        b"\x80\x04",
        b"%PDF-1.4",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"BM",
    ],
)
def test_what_is_no_image_is_said_to_be_none(data: bytes) -> None:
    assert probe(data) in (NOT_AN_IMAGE, TRUNCATED)


@given(
    st.binary(max_size=200),
    st.sampled_from(
        [b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"MM\0*"]
    ),
)
def test_no_bytes_break_the_probe(data: bytes, magic: bytes) -> None:
    found = probe(magic + data)
    assert isinstance(found, Probe | Refused)


@given(data=st.data())
def test_no_damage_breaks_the_probe(crop: Image.Image, data: st.DataObject) -> None:
    kind, mode, options = data.draw(st.sampled_from(CASES))
    whole = bytearray(encode(crop, kind, mode, **options))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, min(400, len(whole) - 1)))] = data.draw(
            st.integers(0, 255)
        )
    found = probe(bytes(whole))
    assert isinstance(found, Probe | Refused)


# --------------------------------------------------------------------------------------- the report


def test_the_report_counts_and_names() -> None:
    report = DataReport()
    report.good(3)
    report.bad(Refused(Reason.UNDECODABLE, "byte 7"), "a.tar", "x")
    report.record([None, EMPTY, None], ["a.tar", "b.tar", "b.tar"], ["p", "y", "z"])
    found = report.to_json()
    assert (found["num_seen"], found["num_bad"]) == (7, 2)
    assert found["reasons"] == {"cannot be decoded": 1, "empty": 1}
    assert found["first"] == [
        {"shard": "a.tar", "key": "x", "reason": "cannot be decoded: byte 7"},
        {"shard": "b.tar", "key": "y", "reason": "empty"},
    ]


def test_a_run_of_bad_samples_stops() -> None:
    report = DataReport(max_bad_in_a_row=3)
    report.bad(EMPTY, "a.tar", "1")
    report.bad(EMPTY, "a.tar", "2")
    report.good()
    report.bad(EMPTY, "a.tar", "3")
    report.bad(EMPTY, "a.tar", "4")
    with pytest.raises(
        DataError, match=r"3 bad samples in a row.*empty \(5\).*a\.tar \(5\)"
    ):
        report.bad(EMPTY, "a.tar", "5")


def test_the_share_counts_the_last_ten_thousand() -> None:
    report = DataReport(max_bad_share=0.001, max_bad_in_a_row=99)
    for number in range(10):
        report.bad(EMPTY, "a.tar", str(number))
        report.good(100)
    with pytest.raises(DataError, match="11 bad samples among the last 10,000"):
        report.bad(EMPTY, "a.tar", "11")
    old = DataReport(max_bad_share=0.001, max_bad_in_a_row=99)
    for number in range(200):
        old.good(999)
        old.bad(EMPTY, "a.tar", str(number))  # never more than ten among ten thousand


def test_a_batch_is_counted_whole_before_it_stops() -> None:
    report = DataReport(max_bad_in_a_row=2)
    with pytest.raises(DataError):
        report.record([EMPTY] * 5, ["a.tar"] * 5, list("abcde"))
    assert report.num_bad == 5


def test_no_more_than_a_hundred_are_named(tmp_path: Path) -> None:
    report = DataReport(max_bad_share=1, max_bad_in_a_row=10**6)
    for number in range(150):
        report.bad(EMPTY, f"{number}.tar", "x")
    report.write(str(tmp_path / "report.json"))
    assert len(report.to_json()["first"]) == 100
    assert (tmp_path / "report.json").read_text().count("reason") == 101
