"""Decoders against Pillow on real crops: the same pixels, the same verdict on what is bad."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.decoders.base import decode_single
from pipeline.decoders.choose import build_decoder
from pipeline.decoders.dali import _route
from pipeline.decoders.turbo import TurboDecoder
from pipeline.errors import ConfigError
from pipeline.sampling.boxes import draw_boxes

CPU = torch.device("cpu")


def boxes_for(images, view):
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    ids = np.arange(len(images))
    return draw_boxes(
        view,
        seed=1,
        epochs_B=np.zeros_like(ids),
        sample_ids_B=ids,
        widths_B=[width for width, _ in sizes],
        heights_B=[height for _, height in sizes],
    )


def as_arrays(images):
    return [np.frombuffer(image, dtype=np.uint8) for image in images]


@pytest.fixture(params=["dali", "turbo", "ffcv"])
def decoder_name(request):
    return request.param


@pytest.fixture
def make_decoder(decoder_name):
    made = []

    def make(view):
        if decoder_name == "ffcv":  # its one filter
            view = view.model_copy(update={"interpolation": "area"})
        decoder = build_decoder(
            LoaderConfig(decoder=decoder_name),
            view=view,
            max_batch_size=64,
            local_world_size=1,
            device=CPU,
        )
        made.append(decoder)
        return decoder

    yield make
    for decoder in made:
        decoder.close()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_pillows(crops, make_decoder, decoder_name, interpolation):
    view = ViewConfig(height=48, width=64, interpolation=interpolation)
    boxes = boxes_for(crops, view)
    decoded = make_decoder(view).decode(as_arrays(crops), boxes)
    assert not decoded.bad
    assert decoded.pixels_BHW3.shape == (len(crops), 48, 64, 3)
    plain = [
        decode_single(image, boxes.take(slice(i, i + 1)), view)
        for i, image in enumerate(as_arrays(crops))
    ]
    difference = np.abs(
        decoded.pixels_BHW3.numpy().astype(int) - np.stack(plain).astype(int)
    )
    if (
        decoder_name == "ffcv"
    ):  # averages over areas, and its JPEG transforms are the coarse ones
        assert difference.mean() < 4
        return
    # Inverse cosine transforms and chroma upsampling may round differently; boxes, filters and
    # flips may not.
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.9) <= 8


def test_area_is_opencvs_and_dali_names_the_alternatives(crops):
    view = ViewConfig(height=32, width=32, interpolation="area")
    with pytest.raises(ConfigError, match=r"bicubic and bilinear.*'turbo'"):
        build_decoder(
            LoaderConfig(decoder="dali"),
            view=view,
            max_batch_size=1,
            local_world_size=1,
            device=CPU,
        )
    decoder = build_decoder(
        LoaderConfig(decoder="auto"),
        view=view,
        max_batch_size=8,
        local_world_size=1,
        device=CPU,
    )
    boxes = boxes_for(crops[:8], view)
    pixels_BHW3 = decoder.decode(as_arrays(crops[:8]), boxes).pixels_BHW3.numpy()
    decoder.close()
    # The mean colour of a box survives averaging over areas.
    whole = np.asarray(Image.open(io.BytesIO(crops[0])).convert("RGB")).astype(float)
    top, left = int(boxes.tops_B[0]), int(boxes.lefts_B[0])
    cut = whole[
        top : top + int(boxes.heights_B[0]), left : left + int(boxes.widths_B[0])
    ]
    assert np.abs(cut.mean((0, 1)) - pixels_BHW3[0].mean((0, 1))).max() < 1


def reencoded(image, kind, mode="RGB"):
    buffer = io.BytesIO()
    Image.open(io.BytesIO(image)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def test_bad_images_are_named_and_the_rest_of_the_batch_is_kept(crops, make_decoder):
    view = ViewConfig(height=32, width=32)
    decoder = make_decoder(view)
    images = list(crops[:16])
    boxes = boxes_for(images, view)
    good = decoder.decode(as_arrays(images), boxes).pixels_BHW3
    images[2] = b"\xff\xd8\xff\xe0 this is no JPEG" * 20
    images[5] = b""
    images[9] = images[9][: len(images[9]) // 2]
    images[12] = encode_small()
    decoded = decoder.decode(as_arrays(images), boxes)
    assert sorted(decoded.bad) == [2, 5, 9, 12]
    assert "smaller than the manifest says" in decoded.bad[12].detail
    kept = [i for i in range(16) if i not in decoded.bad]
    assert torch.equal(decoded.pixels_BHW3[kept], good[kept])
    again = decoder.decode(as_arrays(crops[:16]), boxes)
    assert not again.bad
    assert torch.equal(again.pixels_BHW3, good)


def encode_small():
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("JPEG", "L"), ("PNG", "LA")],
)
def test_other_formats_are_read(crops, make_decoder, kind, mode):
    view = ViewConfig(height=32, width=32, crop="center")
    images = [reencoded(crops[20], kind, mode), crops[21]]
    boxes = boxes_for(images, view)
    decoded = make_decoder(view).decode(as_arrays(images), boxes)
    assert not decoded.bad
    plain = decode_single(as_arrays(images)[0], boxes.take(slice(0, 1)), view).astype(
        int
    )
    assert np.abs(decoded.pixels_BHW3[0].numpy().astype(int) - plain).mean() < 1.5


def test_cmyk_jpegs_are_read(crops, make_decoder):
    view = ViewConfig(height=32, width=32, crop="center")
    images = [reencoded(crops[20], "JPEG", "CMYK")]
    decoded = make_decoder(view).decode(as_arrays(images), boxes_for(images, view))
    assert not decoded.bad
    plain = decode_single(
        np.frombuffer(crops[20], np.uint8), boxes_for(crops[20:21], view), view
    ).astype(int)
    assert np.abs(decoded.pixels_BHW3[0].numpy().astype(int) - plain).mean() < 6


def as_raw(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


@pytest.mark.parametrize("raw_places", [[0, 1, 2, 3], [1, 3]])
def test_raw_pixels_are_cut_like_encoded_images(
    crops, make_decoder, decoder_name, raw_places
):
    view = ViewConfig(height=40, width=40)
    png = [
        reencoded(image, "PNG") for image in crops[:4]
    ]  # lossless: the same pixels either way
    images = as_arrays(png)
    boxes = boxes_for(png, view)
    encoded = make_decoder(view).decode(images, boxes)
    for i in raw_places:
        images[i] = as_raw(png[i])
        images[i].setflags(write=False)  # as a mapped shard gives it
    raw = make_decoder(view).decode(images, boxes)
    assert not raw.bad
    difference = raw.pixels_BHW3.int() - encoded.pixels_BHW3.int()
    # Pillow decoded the PNGs, and resized them: in ffcv with a filter that rounds the edges of
    # areas to whole pixels.
    assert difference.abs().float().mean() < (2.5 if decoder_name == "ffcv" else 0.1)


def test_a_raw_image_smaller_than_its_box_is_named(crops, make_decoder):
    view = ViewConfig(height=32, width=32)
    boxes = boxes_for(crops[:2], view)
    decoded = make_decoder(view).decode(
        [as_raw(crops[0]), np.zeros((4, 5, 3), np.uint8)], boxes
    )
    assert list(decoded.bad) == [1]
    assert decoded.bad[1].detail == "5 x 4 pixels, smaller than the manifest says"


def test_flips_mirror_whole_images(crops):
    for interpolation in ("area", "bicubic"):
        view = ViewConfig(
            height=40, width=40, crop="center", interpolation=interpolation
        )
        decoder = build_decoder(
            LoaderConfig(decoder="turbo"),
            view=view,
            max_batch_size=2,
            local_world_size=1,
            device=CPU,
        )
        boxes = boxes_for([crops[0], crops[0]], view)
        boxes = dataclasses.replace(boxes, flips_B=np.array([False, True]))
        pixels_BHW3 = decoder.decode(as_arrays([crops[0], crops[0]]), boxes).pixels_BHW3
        decoder.close()
        assert torch.equal(pixels_BHW3[0].flip(1), pixels_BHW3[1])


def test_scratch_memory_of_a_large_image_is_given_back(photos):
    image = np.frombuffer(photos["astronaut"], np.uint8)
    view = ViewConfig(height=32, width=32, crop="center")
    decoder = TurboDecoder(view=view, num_threads=1, regions=False)
    large = io.BytesIO()
    Image.new("RGB", (6000, 5000), "teal").save(large, "JPEG")
    images = [image, np.frombuffer(large.getvalue(), np.uint8)]
    decoded = decoder.decode(
        images, boxes_for([photos["astronaut"], large.getvalue()], view)
    )
    assert not decoded.bad
    assert np.abs(decoded.pixels_BHW3[1].numpy().astype(int) - [0, 128, 128]).max() <= 3
    held = decoder._pool.submit(
        lambda: decoder._local.kernels._cutter._scratch.size
    ).result()
    decoder.close()
    assert held == 512 * 512 * 3


def damaged(image):
    """Give copies of a JPEG that are cut or changed, as a bad disk or a broken transfer leaves
    them."""
    size = len(image)
    cut = [
        image[:keep]
        for keep in (
            1,
            3,
            20,
            size // 4,
            size // 2,
            size - 40,
            size - 3,
            size - 2,
            size - 1,
        )
    ]
    flipped = []
    # Into the header too: segment lengths, quantisation and Huffman tables, the frame, the scan.
    for place in (
        5,
        20,
        90,
        167,
        177,
        396,
        428,
        609,
        size // 3,
        size // 2,
        2 * size // 3,
        size - 30,
    ):
        changed = bytearray(image)
        changed[place] ^= 0x55
        flipped.append(bytes(changed))
    zeroed = image[: size // 2] + bytes(size - size // 2)
    return [*cut, *flipped, zeroed, image + b"trailing"]


def test_every_decoder_gives_up_on_the_same_damaged_images(crops, make_decoder):
    view = ViewConfig(height=32, width=32)
    images = [copy for crop in crops[:4] for copy in damaged(crop)]
    boxes = boxes_for([crop for crop in crops[:4] for _ in damaged(crop)], view)
    expected = []
    for i, image in enumerate(as_arrays(images)):
        try:
            decode_single(image, boxes.take(slice(i, i + 1)), view)
        except ValueError:
            expected.append(i)
    assert 20 < len(expected) < len(images) - 4
    assert sorted(make_decoder(view).decode(as_arrays(images), boxes).bad) == expected


def test_dali_never_sees_a_jpeg_whose_header_is_damaged(crops):
    # It has ended the whole process on such images: no test could catch that, so what it is given
    # is looked at.
    good = np.frombuffer(crops[0], np.uint8)
    assert _route(good) == "encoded"
    refused = 0
    for place in range(2, 600):
        changed = good.copy()
        changed[place] ^= 0xFF
        try:
            simplejpeg.decode_jpeg_header(changed)
        except ValueError:
            refused += 1
            assert _route(changed) == "pillow"
    assert refused > 20
    assert [_route(image) for image in (good[:-2], good[:0], as_raw(crops[0]))] == [
        "pillow",
        "pillow",
        "raw",
    ]
