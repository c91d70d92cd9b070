"""Against FFCV itself: its Loader reads our betons, we read its, and the files are laid out alike.

numba compiles for seconds in every Loader: these tests are slow, and FFCV may be missing.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.formats.beton_index import index_shard
from pipeline.formats.beton_writer import BetonWriter
from pipeline.formats.table import FORMATS
from pipeline.images.header import Probe, probe

pytest.importorskip("ffcv._libffcv", reason="FFCV is not installed")
pytestmark = pytest.mark.slow


class Given:
    """Samples as FFCV's writer asks for them."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns[0])

    def __getitem__(self, index):
        return tuple(column[index] for column in self.columns)


def pixels_of(image):
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))


def ffcv_writes(path, columns, fields, *, num_workers=1, page_size=2**23):
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(
        str(path), fields, page_size=page_size, num_workers=num_workers
    )
    writer.from_indexed_dataset(Given(*columns), chunksize=7)


def we_write(path, images, **settings):
    with BetonWriter(str(path), **settings) as writer:
        for number, (image, found) in enumerate(images):
            writer.add(f"{number:03d}", image, found, label=3 * number)
        writer.close()


@pytest.mark.parametrize("page_bytes", [2**21, 2**23])
def test_our_files_are_those_of_ffcvs_writer(tmp_path: Path, page_bytes: int) -> None:
    from ffcv.fields import IntField, JSONField, RGBImageField

    rng = np.random.default_rng(0)  # 150 x 180 pixels, raw: several pages of 2 MiB
    pixels = [
        rng.integers(0, 256, (150 + n % 3, 180, 3), dtype=np.uint8) for n in range(40)
    ]
    metas = [{"key": f"{number:03d}"} for number in range(40)]
    fields = {
        "image": RGBImageField(write_mode="raw"),
        "label": IntField(),
        "meta": JSONField(),
    }
    ffcv_writes(
        tmp_path / "theirs",
        (pixels, [3 * n for n in range(40)], metas),
        fields,
        page_size=page_bytes,
    )
    given = [
        (image.tobytes(), Probe("raw", image.shape[1], image.shape[0], "RGB"))
        for image in pixels
    ]
    we_write(tmp_path / "ours", given, page_bytes=page_bytes)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("os_cache", [True, False])
def test_ffcvs_loader_reads_our_betons(
    tmp_path: Path, crops: list[bytes], os_cache: bool
) -> None:
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    squares = []
    for number, image in enumerate(crops[:24]):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(image)).resize((64, 64)).save(buffer, "JPEG", quality=90)
        square = buffer.getvalue()
        raw = (pixels_of(square).tobytes(), Probe("raw", 64, 64, "RGB"))
        squares.append((square, probe(square)) if number % 4 else raw)
    we_write(tmp_path / "x.beton", squares)
    loader = Loader(
        str(tmp_path / "x.beton"),
        batch_size=8,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        os_cache=os_cache,
        pipelines={
            "image": [CenterCropRGBImageDecoder((64, 64), 1.0)],
            "label": [IntDecoder()],
        },
    )
    seen, labels, metas = [], [], []
    for images, label, meta in loader:
        seen += list(np.array(images))
        labels += np.array(label).ravel().tolist()
        metas += [json.loads(bytes(row).split(b"\0")[0]) for row in np.array(meta)]
    assert labels == [3 * number for number in range(24)]
    assert metas == [{"key": f"{number:03d}"} for number in range(24)]
    for (stored, found), image in zip(squares, seen, strict=True):
        if found.format == "raw":
            assert image.tobytes() == stored
        else:
            # FFCV asks libjpeg-turbo for its faster, coarser inverse cosine transform.
            assert (
                np.abs(image.astype(int) - simplejpeg.decode_jpeg(stored)).mean() < 1.5
            )


@pytest.mark.parametrize(("write_mode", "num_workers"), [("jpg", 1), ("raw", 2)])
def test_we_read_the_betons_of_ffcvs_writer(
    tmp_path, crops, write_mode, num_workers
) -> None:
    from ffcv.fields import IntField, RGBImageField

    images = [pixels_of(image) for image in crops]
    fields = {"image": RGBImageField(write_mode=write_mode), "label": IntField()}
    path = tmp_path / "theirs.beton"
    ffcv_writes(
        path,
        (images, list(range(len(images)))),
        fields,
        num_workers=num_workers,
        page_size=2**21,
    )
    found = index_shard(str(path))
    assert not found.bad
    assert found.table.labels.tolist() == list(range(len(images)))
    data = path.read_bytes()
    for row, image in enumerate(images):
        stored = data[
            found.table.offsets[row] : found.table.offsets[row] + found.table.sizes[row]
        ]
        assert (found.table.heights[row], found.table.widths[row]) == image.shape[:2]
        if write_mode == "raw":
            assert FORMATS[found.table.formats[row]] == "raw"
            assert stored == image.tobytes()
        else:
            assert np.abs(simplejpeg.decode_jpeg(stored).astype(int) - image).mean() < 4
