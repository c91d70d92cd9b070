"""Kinds of images that real collections hold and that few programs write: the probe against
Pillow, and every decoder on what the probe lets in."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import ViewConfig
from pipeline.decoders.base import Decoder
from pipeline.decoders.dali import DaliDecoder
from pipeline.decoders.ffcv import FfcvDecoder
from pipeline.decoders.jpeg import is_whole_jpeg
from pipeline.decoders.turbo import TurboDecoder
from pipeline.images.decodable import undecodable
from pipeline.images.header import DEFAULT_LIMITS, Probe, probe, screen
from pipeline.images.jpeg_header import is_common
from pipeline.images.pixel_sums import PixelSums
from pipeline.images.refused import Reason, Refused
from pipeline.sampling.boxes import Boxes
from tests import odd_images
from tests.odd_images import (
    big_tiff,
    bitmap,
    jpeg,
    lossless_jpeg,
    with_frame,
    with_strays,
)

STRAYS = st.binary(max_size=9).filter(lambda data: b"\xff" not in data)
FILLS = st.integers(0, 5).map(lambda count: b"\xff" * count)
STUFFED = st.lists(st.sampled_from([b"\xff\0", b"\0", b"a"]), max_size=4).map(b"".join)


@pytest.fixture(scope="module")
def photo(photo_paths: dict[str, Path]) -> Image.Image:
    with Image.open(photo_paths["astronaut"]) as image:
        return image.convert("RGB").crop((100, 50, 381, 353))


def check_against_pillow(data: bytes) -> Probe:
    """The probe says what Pillow says, and the pixels can be decoded."""
    found = probe(data)
    assert isinstance(found, Probe), found
    with Image.open(io.BytesIO(data)) as image:
        assert image.format is not None
        assert found.format == image.format.lower()
        assert (found.width, found.height) == image.size
        assert found.mode == image.mode
        assert found.orientation == image.getexif().get(0x0112, 1)
    assert undecodable(data) is None
    return found


# ------------------------------------------------------------------------------------------ JPEG
@given(data=st.data())
def test_strays_before_markers_are_skipped_as_pillow_skips_them(
    photo: Image.Image, data: st.DataObject
) -> None:
    size = data.draw(st.tuples(st.integers(1, 60), st.integers(1, 60)))
    exif = Image.Exif()
    exif[0x0112] = data.draw(st.integers(1, 8))
    plain = jpeg(
        photo.resize(size).convert(data.draw(st.sampled_from(["RGB", "L", "CMYK"]))),
        progressive=data.draw(st.booleans()),
        exif=exif.tobytes(),
    )
    # All tell a JPEG by FF D8 FF: before the first marker only fill bytes are possible.
    strays = {0: data.draw(FILLS)}
    for number in range(1, len(odd_images.marker_places(plain))):
        strays[number] = data.draw(st.one_of(STRAYS, STUFFED)) + data.draw(FILLS)
    odd = with_strays(plain, strays) + data.draw(st.binary(max_size=20))
    assert check_against_pillow(odd) == check_against_pillow(plain)
    clean = not any(text.strip(b"\xff") for text in strays.values())
    assert is_common(memoryview(odd)) == clean


def test_a_cut_file_with_strays_is_still_cut(photo: Image.Image) -> None:
    odd = with_strays(jpeg(photo.resize((40, 30))), {1: b"abc", 3: b"\xff\0\0"})
    for length in range(3, len(odd)):
        found = probe(odd[:length])
        assert isinstance(found, Refused)
        assert found.reason in (Reason.TRUNCATED, Reason.NOT_AN_IMAGE)


def test_what_declares_too_much_is_refused_behind_strays(photo: Image.Image) -> None:
    plain = jpeg(photo.resize((40, 30)))
    at = plain.index(b"\xff\xc0") + 5
    bomb = plain[:at] + b"\xea\x60\xea\x60" + plain[at + 4 :]
    for odd in (bomb, with_strays(bomb, {1: b"junk", 2: b"\xff\xff", 3: b"\0"})):
        assert screen(odd, DEFAULT_LIMITS) == Refused(Reason.TOO_MANY_PIXELS)


def test_much_padding_takes_no_time(photo: Image.Image) -> None:
    """4 MB of fill bytes, or of anything else, are passed over at once and not byte by byte."""
    plain = jpeg(photo.resize((40, 30)))
    for stray in (b"\xff" * 2**22, b"a" * 2**22, b"\xff\0" * 2**21):
        assert probe(with_strays(plain, {2: stray})) == probe(plain)
        assert isinstance(probe(plain[:2] + stray), Refused)


@pytest.mark.parametrize("marker", [0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF])
def test_kinds_that_no_decoder_reads_are_refused_by_the_header(
    photo: Image.Image, marker: int
) -> None:
    odd = with_frame(jpeg(photo.resize((40, 30))), marker=marker)
    for data in (odd, with_strays(odd, {1: b"x"})):
        found = probe(data)
        assert isinstance(found, Refused)
        assert found.reason == Reason.UNDECODABLE
        assert "no decoder here reads" in found.detail
        with pytest.raises(OSError), Image.open(io.BytesIO(data)) as image:
            image.load()


@pytest.mark.parametrize("precision", [2, 7, 9, 10, 12, 16])
@pytest.mark.parametrize("marker", [0xC0, 0xC1, 0xC2, 0xC3, 0xC9])
def test_other_precisions_are_refused_by_the_header(
    photo: Image.Image, marker: int, precision: int
) -> None:
    odd = with_frame(jpeg(photo.resize((40, 30))), marker=marker, precision=precision)
    found = probe(odd)
    assert isinstance(found, Refused)
    assert str(found) == (
        f"cannot be decoded: a JPEG of {precision} bits per sample; decoders here read 8"
    )


def test_lossless_jpeg_of_8_bits_is_read_and_of_more_refused(
    photo: Image.Image,
) -> None:
    grey = np.asarray(photo.convert("L"))[:40, :60]
    data = lossless_jpeg(grey)
    assert check_against_pillow(data).mode == "L"
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(np.asarray(image), grey)
    deep = lossless_jpeg(grey.astype(int) * 16, bits=12)
    assert str(probe(deep)).startswith("cannot be decoded: a JPEG of 12 bits")
    assert undecodable(deep) is not None


# -------------------------------------------------------------------------------------- decoders
def decoders() -> dict[str, Decoder]:
    made: dict[str, Decoder] = {}
    for filter_name in ("bicubic", "area"):
        view = ViewConfig(height=64, width=64, interpolation=filter_name)
        made[f"turbo {filter_name}"] = TurboDecoder(view=view, num_threads=1)
    if importlib.util.find_spec("ffcv"):
        made["ffcv"] = FfcvDecoder(
            view=ViewConfig(height=64, width=64, interpolation="area"), num_threads=1
        )
    if importlib.util.find_spec("nvidia.dali"):
        made["dali"] = DaliDecoder(
            view=ViewConfig(height=64, width=64, interpolation="bicubic"),
            max_batch_size=4,
            num_threads=1,
            device=torch.device("cpu"),
        )
    return made


def test_every_decoder_decodes_what_the_probe_lets_in(photo: Image.Image) -> None:
    """From a box that is small enough for a part to be decoded, where that is done."""
    plain = jpeg(photo, quality=95)
    grey = photo.convert("L")
    files = {
        "strays": with_strays(plain, {1: b"abc", 3: b"\0", 4: b"\xff\0xy"}),
        "fill bytes": with_strays(plain, {0: b"\xff\xff", 2: b"\xff" * 9}),
        "behind the end": plain + b"\0trailing",
        "extended": with_frame(plain, marker=0xC1),
        "lossless": lossless_jpeg(np.asarray(grey)),
        "BigTIFF": big_tiff(photo, num_strips=4),
        "BMP 52": bitmap(photo, header_bytes=52),
        "BMP 64": bitmap(photo, header_bytes=64, bits=32),
    }
    top_left = np.array([20, 0], dtype=np.int32)
    side = np.array([64, 280], dtype=np.int32)
    for name, decoder in decoders().items():
        for kind, data in files.items():
            assert isinstance(probe(data), Probe), kind
            expected = photo if kind != "lossless" else grey.convert("RGB")
            for top, length in zip(top_left.tolist(), side.tolist(), strict=True):
                first = np.array([top], dtype=np.int32)
                sides = np.array([length], dtype=np.int32)
                box = Boxes(first, first, sides, sides, np.zeros(1, dtype=np.bool_))
                decoded = decoder.decode([np.frombuffer(data, np.uint8)], box)
                assert not decoded.bad, (name, kind, decoded.bad)
                area = (top, top, top + length, top + length)
                reference = np.asarray(
                    expected.resize((64, 64), Image.Resampling.BICUBIC, box=area),
                    dtype=int,
                )
                pixels = decoded.pixels_BHW3[0].numpy().astype(int)
                assert np.abs(pixels - reference).mean() < 6, (name, kind)
        if hasattr(decoder, "close"):
            decoder.close()


def test_what_is_not_common_does_not_reach_a_parser_that_was_not_tried_on_it(
    photo: Image.Image,
) -> None:
    plain = jpeg(photo)

    def whole(data: bytes) -> bool:
        return is_whole_jpeg(np.frombuffer(data, np.uint8))

    assert whole(plain)
    assert whole(plain + b"trailing")
    assert whole(with_strays(plain, {2: b"\xff\xff"}))
    assert not whole(with_strays(plain, {2: b"a"}))
    assert not whole(with_frame(plain, marker=0xC9))
    assert not whole(lossless_jpeg(np.asarray(photo.convert("L"))[:40, :60]))


# -------------------------------------------------------------------------------- TIFF and BMP
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    mode=st.sampled_from(["RGB", "L", "RGBA", "CMYK"]),
    order=st.sampled_from("<>"),
    num_strips=st.integers(1, 5),
    pages=st.integers(1, 2),
)
def test_big_tiff_is_read_as_pillow_reads_it(
    photo: Image.Image,
    size: tuple[int, int],
    mode: str,
    order: str,
    num_strips: int,
    pages: int,
) -> None:
    data = big_tiff(
        photo.resize(size).convert(mode),
        order=order,
        num_strips=min(num_strips, size[1]),
        pages=pages,
    )
    if order == ">":
        # Pillow does not read it: then the header says so.
        found = probe(data)
        assert isinstance(found, Refused)
        assert found.reason == Reason.UNDECODABLE
        with pytest.raises(OSError):
            Image.open(io.BytesIO(data))
        return
    assert check_against_pillow(data).animated == (pages > 1)
    if pages == 1:
        assert isinstance(probe(data[:-1]), Refused)


@given(place=st.integers(0, 250), value=st.integers(0, 255))
def test_no_damage_of_a_big_tiff_breaks_the_probe(
    photo: Image.Image, place: int, value: int
) -> None:
    data = bytearray(big_tiff(photo.resize((9, 8)), num_strips=2))
    data[place] = value
    found = screen(bytes(data), DEFAULT_LIMITS)
    assert isinstance(found, Probe | Refused)


@given(
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    header_bytes=st.sampled_from([12, 40, 52, 56, 64, 108, 124]),
    bits=st.sampled_from([24, 32]),
    top_down=st.booleans(),
)
def test_bitmaps_of_every_header_are_read_as_pillow_reads_them(
    photo: Image.Image,
    size: tuple[int, int],
    header_bytes: int,
    bits: int,
    top_down: bool,
) -> None:
    if header_bytes == 12:
        top_down, bits = False, 24
    data = bitmap(
        photo.resize(size), header_bytes=header_bytes, bits=bits, top_down=top_down
    )
    found = probe(data)
    assert isinstance(found, Probe)
    if bits == 32 and header_bytes not in (52, 64):
        # Manifests have always had this mode for 32 bits, with or without a mask for alpha.
        assert found.mode == "RGBA"
        with Image.open(io.BytesIO(data)) as image:
            assert (found.width, found.height) == image.size
        return
    check_against_pillow(data)
    assert isinstance(probe(data[:-1]), Refused)


def test_statistics_count_what_the_probe_lets_in(photo: Image.Image) -> None:
    plain = jpeg(photo)
    sums = PixelSums()
    for data in (
        plain,
        with_strays(plain, {2: b"abc"}),
        lossless_jpeg(np.asarray(photo)[..., 0]),
    ):
        found = probe(data)
        assert isinstance(found, Probe)
        sums.add(data, found)
    assert (sums.num_images, sums.num_undecodable) == (3, 0)
