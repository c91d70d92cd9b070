"""Regions of JPEGs, batches that are decoded ahead, and what a tuning file decides."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.decoders.choose import build_decoder, with_tuning
from pipeline.decoders.jpeg import JpegCutter, has_regions, is_whole_jpeg
from pipeline.decoders.tuning import Tuning, write_tuning
from pipeline.errors import ConfigError
from pipeline.loader.transfer import PixelBuffers
from pipeline.sampling.boxes import draw_boxes

CPU = torch.device("cpu")
VIEW = ViewConfig(height=32, width=32)


def jpeg(pixels_HW3, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "JPEG", **{"quality": 85, **options})
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


@pytest.fixture(scope="module")
def kinds(photos):
    """One photograph as JPEGs of every kind that cameras and tools write."""
    whole = np.asarray(Image.open(io.BytesIO(photos["astronaut"])).convert("RGB"))[
        :331, :257
    ]
    return {
        "4:4:4": jpeg(whole, subsampling=0),
        "4:2:2": jpeg(whole, subsampling=1),
        "4:2:0": jpeg(whole, subsampling=2),
        "progressive": jpeg(whole, progressive=True),
        "restarts": jpeg(whole, restart_marker_blocks=3),
        "grey": jpeg(whole[:, :, 0]),
        "thumbnail inside": np.concatenate(
            [jpeg(whole)[:2], _application_part(jpeg(whole[:40, :40])), jpeg(whole)[2:]]
        ),
    }


def _application_part(data):
    return np.frombuffer(
        b"\xff\xe5" + (len(data) + 2).to_bytes(2, "big") + data.tobytes(),
        dtype=np.uint8,
    )


@pytest.mark.skipif(not has_regions(), reason="nvImageCodec is not installed")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_region_has_the_pixels_of_the_whole_image(kinds, data):
    kind = data.draw(st.sampled_from(sorted(kinds)))
    image = kinds[kind]
    height, width = simplejpeg.decode_jpeg_header(image)[:2]
    top, left = (
        data.draw(st.integers(0, height - 1)),
        data.draw(st.integers(0, width - 1)),
    )
    box = {
        "top": top,
        "left": left,
        "height": data.draw(st.integers(1, height - top)),
        "width": data.draw(st.integers(1, width - left)),
    }
    cutters = _cutters()
    part, plain = cutters[0].cut(image, **box), cutters[1].cut(image, **box)
    assert part.shape == plain.shape == (box["height"], box["width"], 3)
    assert np.array_equal(part, plain)


_made: list[JpegCutter] = []


def _cutters():
    if not _made:
        _made.extend([JpegCutter(regions=True), JpegCutter(regions=False)])
    return _made


@pytest.mark.skipif(not has_regions(), reason="nvImageCodec is not installed")
def test_regions_are_really_used(kinds, monkeypatch):
    cutter = JpegCutter()
    monkeypatch.setattr(
        simplejpeg, "decode_jpeg", lambda *_, **__: pytest.fail("decoded whole")
    )
    assert cutter.cut(kinds["4:2:0"], top=10, left=20, height=100, width=90).shape == (
        100,
        90,
        3,
    )


def test_what_is_cut_short_is_seen_above_the_box_too(kinds):
    image = kinds["4:2:0"]
    box = {"top": 0, "left": 0, "height": 40, "width": 40}
    short = image[: 3 * image.size // 4].copy()
    assert is_whole_jpeg(image)
    assert not is_whole_jpeg(short)
    assert JpegCutter().cut(short, **box) is None
    with pytest.raises(
        ValueError, match="257 x 331 pixels, smaller than the manifest says"
    ):
        JpegCutter().cut(image, top=300, left=0, height=32, width=32)


def boxes_of(images):
    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    ids = np.arange(len(images))
    widths, heights = zip(*sizes, strict=True)
    return draw_boxes(
        VIEW,
        seed=1,
        epochs_B=0 * ids,
        sample_ids_B=ids,
        widths_B=widths,
        heights_B=heights,
    )


@pytest.fixture(params=["dali", "turbo"])
def decoder(request):
    made = build_decoder(
        LoaderConfig(decoder=request.param, num_threads=2),
        view=VIEW,
        max_batch_size=8,
        local_world_size=1,
        device=CPU,
    )
    yield made
    made.close()


def test_batches_ahead_come_out_in_order_and_alike(crops, decoder):
    parts = [crops[first : first + 8] for first in range(0, 40, 8)]
    images = [[np.frombuffer(image, np.uint8) for image in part] for part in parts]
    expected = [
        decoder.decode(*batch).pixels_BHW3.clone()
        for batch in zip(images, map(boxes_of, parts), strict=True)
    ]
    assert decoder.depth > 1
    out = [torch.empty(8, 32, 32, 3, dtype=torch.uint8) for _ in parts]
    waits, found = [], []
    for part, batch, buffer in zip(parts, images, out, strict=True):
        waits.append(decoder.submit(batch, boxes_of(part), buffer))
        if len(waits) == decoder.depth:
            found.append(waits.pop(0)())
    found += [wait() for wait in waits]
    for decoded, buffer, pixels_BHW3 in zip(found, out, expected, strict=True):
        assert not decoded.bad
        assert decoded.pixels_BHW3.data_ptr() == buffer.data_ptr()
        assert torch.equal(decoded.pixels_BHW3, pixels_BHW3)


def test_a_bad_image_costs_no_batch_that_is_ahead(crops, decoder):
    """A PNG whose header is good and whose pixels are not: DALI itself meets it, with another batch
    behind."""
    first, second = crops[:8], crops[8:16]
    boxes = boxes_of(first), boxes_of(second)
    images = [
        [np.frombuffer(image, np.uint8) for image in part] for part in (first, second)
    ]
    expected = [
        decoder.decode(*batch).pixels_BHW3.clone()
        for batch in zip(images, boxes, strict=True)
    ]
    buffer = io.BytesIO()
    Image.open(io.BytesIO(first[3])).save(buffer, "PNG")
    images[0][3] = np.frombuffer(buffer.getvalue(), np.uint8).copy()
    images[0][3][200:400] ^= 0x55
    waits = [decoder.submit(*batch) for batch in zip(images, boxes, strict=True)]
    broken, behind = [wait() for wait in waits]
    assert set(broken.bad) == {3}
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(broken.pixels_BHW3[others], expected[0][others])
    assert not behind.bad
    assert torch.equal(behind.pixels_BHW3, expected[1])
    again = decoder.submit(images[1], boxes[1])()  # and the decoder works on
    assert torch.equal(again.pixels_BHW3, expected[1])


def test_host_buffers_are_used_again_only_when_given_back():
    buffers = PixelBuffers((2, 4, 4, 3), pinned=False)
    first, second = buffers.take(), buffers.take()
    assert first.data_ptr() != second.data_ptr()
    buffers.give_back(first)
    assert buffers.take().data_ptr() == first.data_ptr()


def test_a_tuning_file_decides_what_is_left_open(tmp_path):
    path = tmp_path / "tuned.toml"
    write_tuning(
        path,
        Tuning(decoder="ffcv", num_threads=3, hw_decoder_load=0.5),
        device=CPU,
        comment="measured\ntwice",
    )
    tuned = with_tuning(LoaderConfig(tuning_file=str(path)), device=CPU)
    assert (
        tuned.decoder,
        tuned.num_threads,
        tuned.hw_decoder_load,
        tuned.dali_depth,
    ) == (
        "ffcv",
        3,
        0.5,
        0,
    )
    kept = with_tuning(
        LoaderConfig(tuning_file=str(path), decoder="dali", num_threads=1), device=CPU
    )
    assert (kept.decoder, kept.num_threads) == ("dali", 1)
    with pytest.raises(ConfigError, match="FFCV has only area"):
        build_decoder(
            LoaderConfig(tuning_file=str(path)),
            view=VIEW,
            max_batch_size=1,
            local_world_size=1,
            device=CPU,
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "machine = 'Other GPU, 4 cores'\n[loader]\ndecoder = 'turbo'\nnum_threads = 2\n",
            "was written for 'Other GPU, 4 cores'",
        ),
        ("[loader]\ndecoder = 'fast'\nnum_threads = 2\n", "cannot be used"),
        ("[loader\n", "cannot be used"),
    ],
)
def test_a_tuning_file_that_does_not_fit_is_refused(tmp_path, text, message):
    path = tmp_path / "tuned.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        with_tuning(LoaderConfig(tuning_file=str(path)), device=CPU)
    with pytest.raises(ConfigError, match="cannot be used"):
        with_tuning(LoaderConfig(tuning_file=str(tmp_path / "none.toml")), device=CPU)
