"""Decoders against Pillow on real crops: the same pixels, the same verdict on what is bad."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import draw_boxes
from pipeline.config import LoaderConfig, ViewConfig
from pipeline.decoders.base import decode_single
from pipeline.decoders.choose import build_decoder
from pipeline.errors import ConfigError

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


@pytest.fixture(params=["dali", "turbo"])
def make_decoder(request):
    made = []

    def make(view):
        decoder = build_decoder(
            LoaderConfig(decoder=request.param), view=view, max_batch_size=64, num_threads=2, device=CPU
        )
        made.append(decoder)
        return decoder

    yield make
    for decoder in made:
        decoder.close()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels_are_pillows(crops, make_decoder, interpolation):
    view = ViewConfig(height=48, width=64, interpolation=interpolation)
    boxes = boxes_for(crops, view)
    decoded = make_decoder(view).decode(as_arrays(crops), boxes)
    assert not decoded.bad
    assert decoded.pixels_BHW3.shape == (len(crops), 48, 64, 3)
    plain = [decode_single(image, boxes.take(slice(i, i + 1)), view) for i, image in enumerate(as_arrays(crops))]
    difference = np.abs(decoded.pixels_BHW3.numpy().astype(int) - np.stack(plain).astype(int))
    # Inverse cosine transforms and chroma upsampling may round differently; boxes, filters and flips may not.
    assert difference.mean() < 0.5
    assert np.percentile(difference, 99.9) <= 8


def test_area_is_opencvs_and_dali_names_the_alternatives(crops):
    view = ViewConfig(height=32, width=32, interpolation="area")
    with pytest.raises(ConfigError, match=r"bicubic and bilinear.*'turbo'"):
        build_decoder(LoaderConfig(decoder="dali"), view=view, max_batch_size=1, num_threads=1, device=CPU)
    decoder = build_decoder(LoaderConfig(decoder="auto"), view=view, max_batch_size=8, num_threads=1, device=CPU)
    boxes = boxes_for(crops[:8], view)
    pixels_BHW3 = decoder.decode(as_arrays(crops[:8]), boxes).pixels_BHW3.numpy()
    decoder.close()
    # The mean colour of a box survives averaging over areas.
    whole = np.asarray(Image.open(io.BytesIO(crops[0])).convert("RGB")).astype(float)
    top, left = int(boxes.tops_B[0]), int(boxes.lefts_B[0])
    cut = whole[top : top + int(boxes.heights_B[0]), left : left + int(boxes.widths_B[0])]
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
    assert "smaller than the manifest says" in decoded.bad[12]
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
    ("kind", "mode"), [("PNG", "RGB"), ("WEBP", "RGB"), ("GIF", "P"), ("JPEG", "L"), ("PNG", "LA")]
)
def test_other_formats_are_read(crops, make_decoder, kind, mode):
    view = ViewConfig(height=32, width=32, crop="center")
    images = [reencoded(crops[20], kind, mode), crops[21]]
    boxes = boxes_for(images, view)
    decoded = make_decoder(view).decode(as_arrays(images), boxes)
    assert not decoded.bad
    plain = decode_single(as_arrays(images)[0], boxes.take(slice(0, 1)), view).astype(int)
    assert np.abs(decoded.pixels_BHW3[0].numpy().astype(int) - plain).mean() < 1.5


def test_cmyk_jpegs_are_read(crops, make_decoder):
    view = ViewConfig(height=32, width=32, crop="center")
    images = [reencoded(crops[20], "JPEG", "CMYK")]
    decoded = make_decoder(view).decode(as_arrays(images), boxes_for(images, view))
    assert not decoded.bad
    plain = decode_single(np.frombuffer(crops[20], np.uint8), boxes_for(crops[20:21], view), view).astype(int)
    assert np.abs(decoded.pixels_BHW3[0].numpy().astype(int) - plain).mean() < 6
