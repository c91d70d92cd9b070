"""`pipeline.convert --apply-exif`: turned without loss, or named and left as it was."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.images.decodable import undecodable
from pipeline.images.header import Probe, probe
from pipeline.images.upright import Unturned, make_upright
from pipeline.verify import verify
from tests.odd_images import jpeg, with_strays


@pytest.fixture(scope="module")
def photo(photo_paths: dict[str, Path]) -> Image.Image:
    with Image.open(photo_paths["astronaut"]) as image:
        return image.convert("RGB").crop((100, 50, 228, 130))


def exif(orientation: int, *, order: str = "<") -> bytes:
    tags = Image.Exif()
    tags.endian = order
    tags[0x010F] = "maker"
    tags[0x0112] = orientation
    return tags.tobytes()


def header_of(data: bytes) -> Probe:
    found = probe(data)
    assert isinstance(found, Probe)
    return found


def turned(data: bytes) -> bytes:
    upright = make_upright(data, header_of(data))
    assert isinstance(upright, bytes), upright
    return upright


def pixels(data: bytes, *, upright: bool = False) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image) if upright else image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 2},
        {"subsampling": 2, "progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
    ],
)
def test_a_jpeg_of_whole_blocks_is_turned_in_its_coefficients(
    photo: Image.Image, orientation: int, options: dict[str, object]
) -> None:
    """So that the pixels are those of turning the decoded image, up to the rounding of a
    transform whose rows and columns have changed places."""
    mode = str(options.get("mode", "RGB"))
    given = {name: value for name, value in options.items() if name != "mode"}
    for order in "<>":
        data = jpeg(
            photo.convert(mode),
            exif=exif(orientation, order=order),
            icc_profile=b"icc",
            **given,
        )
        upright = turned(data)
        if orientation == 1:
            assert upright is data
            continue
        found = header_of(upright)
        assert found.orientation == 1
        assert found.progressive == header_of(data).progressive
        assert found.mode == mode
        expected = pixels(data, upright=True)
        made = pixels(upright)
        assert made.shape == expected.shape
        # Chroma at half the size is blended with its neighbours after the turn.
        assert np.abs(made.astype(int) - expected).mean() < 0.6
        assert undecodable(upright) is None
        with Image.open(io.BytesIO(upright)) as image:
            assert image.info["icc_profile"] == b"icc"
            assert image.getexif()[0x010F] == "maker"


def test_turning_back_gives_the_same_coefficients(photo: Image.Image) -> None:
    data = jpeg(photo, exif=exif(6), subsampling=2)
    once = turned(data)
    at = once.index(b"Exif\0\0")
    entry = once.index(b"\x12\x01\x03\0\x01\0\0\0", at) + 8
    back = turned(once[:entry] + b"\x08" + once[entry + 1 :])
    assert np.array_equal(pixels(back), pixels(data))


@pytest.mark.parametrize(
    ("size", "orientation"), [((61, 48), 2), ((64, 43), 6), ((64, 43), 3)]
)
def test_a_jpeg_of_broken_blocks_stays_as_it_is_and_says_why(
    photo: Image.Image, size: tuple[int, int], orientation: int
) -> None:
    data = jpeg(photo.resize(size), exif=exif(orientation))
    stays = make_upright(data, header_of(data))
    assert isinstance(stays, Unturned)
    assert f"{size[0]} x {size[1]} pixels do not divide into whole blocks" in stays.why
    # Only turned about the diagonal no block at an edge has to move to the other side.
    diagonal = jpeg(photo.resize(size), exif=exif(5))
    assert header_of(turned(diagonal)).orientation == 1


def test_damage_and_strays_end_in_a_word(photo: Image.Image) -> None:
    plain = jpeg(photo, exif=exif(6))
    for data in (
        with_strays(plain, {3: b"abc"}),
        plain[: len(plain) // 2] + b"\xff\xd9",
    ):
        stays = make_upright(data, header_of(data))
        assert isinstance(stays, Unturned | bytes)
        if isinstance(stays, bytes):
            assert undecodable(stays) is None
        else:
            assert "libturbojpeg cannot turn it" in stays.why


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_png_is_written_anew_with_the_same_pixels(
    photo: Image.Image, mode: str
) -> None:
    image = (
        photo.convert("I").convert("I;16") if mode == "I;16" else photo.convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif(8))
    data = buffer.getvalue()
    upright = make_upright(data, header_of(data))
    if isinstance(upright, Unturned):
        # The header does not say how deep a grey or a palette is.
        assert mode == "1"
        return
    assert np.array_equal(pixels(upright), pixels(data, upright=True))
    assert np.array_equal(pixels(upright, upright=True), pixels(upright))
    assert header_of(upright).mode == header_of(data).mode


def test_other_formats_are_turned_without_loss_or_named(photo: Image.Image) -> None:
    def encoded(kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        photo.save(buffer, kind, **options)
        return buffer.getvalue()

    lossless = encoded("WEBP", lossless=True, exif=exif(6))
    assert np.array_equal(pixels(turned(lossless)), pixels(lossless, upright=True))
    lossy = encoded("WEBP", exif=exif(6))
    frames = [photo.rotate(angle) for angle in (90, 180)]
    animated = encoded("PNG", exif=exif(6), save_all=True, append_images=frames)
    for data in (lossy, animated):
        stays = make_upright(data, header_of(data))
        assert isinstance(stays, Unturned)
        assert "orientation 6" in stays.why
    for kind in ("PNG", "WEBP", "GIF", "BMP"):
        data = encoded(kind)
        assert turned(data) is data
    upright = encoded("PNG", exif=exif(1))
    assert turned(upright) is upright


# -------------------------------------------------------------------------------- conversions
@pytest.fixture
def source(photo: Image.Image, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "upright.jpg").write_bytes(jpeg(photo))
    (folder / "turned.jpg").write_bytes(jpeg(photo, exif=exif(6)))
    (folder / "broken.jpg").write_bytes(jpeg(photo.resize((61, 43)), exif=exif(6)))
    photo.save(folder / "turned.png", exif=exif(6))
    return folder


def sizes_of(target: Path) -> dict[str, tuple[int, int]]:
    table = open_dataset(str(target)).shard_table(0)
    return {
        key: (int(width), int(height))
        for key, width, height in zip(
            table.keys, table.widths, table.heights, strict=True
        )
    }


def test_a_conversion_turns_what_it_can_and_lists_the_rest(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    convert(str(source), str(target), ConvertSettings(apply_exif=True), workers=1)
    sizes = sorted(sizes_of(target).values())
    assert sizes == [(61, 43), (80, 128), (80, 128), (128, 80)]
    rows = pq.read_table(target / "not_upright.parquet").to_pylist()
    assert [row["key"] for row in rows] == ["broken.jpg"]
    assert "whole blocks" in rows[0]["reason"]
    assert "1 images keep their EXIF orientation" in capsys.readouterr().err
    assert verify(str(target), full=True).problems == []


def test_without_the_option_a_conversion_is_what_it_was(
    source: Path, tmp_path: Path
) -> None:
    plain = ConvertSettings()
    assert "apply_exif" not in plain.describe()
    # Shrunk images are upright anyway.
    assert "apply_exif" not in ConvertSettings(apply_exif=True, resize=64).describe()
    assert ConvertSettings(apply_exif=True).describe()["apply_exif"] is True
    target = tmp_path / "made"
    convert(str(source), str(target), plain, workers=1)
    assert sorted(sizes_of(target).values()) == [
        (61, 43),
        (128, 80),
        (128, 80),
        (128, 80),
    ]
    assert not (target / "not_upright.parquet").exists()
    assert (
        json.loads((target / "dataset.json").read_text())["made_by"]["plan"]["versions"]
        == {}
    )
