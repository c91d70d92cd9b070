"""What the loader benchmark compares: this loader, the loaders that others use, and the bare loop
that bounds both.

Every subject gives batches of 224-pixel uint8 images from boxes of 20-100% of the area, half of
them mirrored, without end, and yields how many images each batch had. All of them read the same
photographs.

Shapes: B images, H W 224 pixels, 3 RGB.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
import torch
import torch.utils.dlpack

from pipeline.config import LoaderConfig, OrderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.loader import Loader
from pipeline.reading.reader import ShardReader
from pipeline.sampling.boxes import draw_boxes

# As every published recipe of masked autoencoders cuts: 224 pixels from 20-100% of the area.
SIZE = 224
MIN_AREA = 0.2
ORDER = OrderConfig(lanes=4)
"""The default's 256 lanes would hold six of these samples each, to be permuted anew every 24
batches: 12 microseconds an image. ImageNet's order costs 2.6 with 256 lanes; this one 0.9."""
Filter = Literal["bicubic", "bilinear", "area"]
Batches = Iterator[int]


@dataclass(frozen=True)
class Setup:
    """What all subjects share.

    Args:
        folder: Folder of the datasets.
        num_threads: Threads, or worker processes, of each subject.
        batch_size: Images per batch.
        device: Device that batches go to.
    """

    folder: Path
    num_threads: int
    batch_size: int
    device: str = "cpu"


@dataclass(frozen=True)
class Subject:
    """One thing that is measured.

    Args:
        name: For the table.
        dataset: Which variant of the photographs it reads.
        resize_filter: Its resize filter.
        build: Starts it.
    """

    name: str
    dataset: str
    resize_filter: str
    build: Callable[[Setup, Subject], Batches]


def ours(
    decoder: Literal["turbo", "dali", "ffcv"], hw_decoder_load: float = 0.0
) -> Callable[[Setup, Subject], Batches]:
    """Return a builder of this loader with a decoder and, if given, a share of a GPU's JPEG
    engine."""

    def build(setup: Setup, subject: Subject) -> Batches:
        folder = setup.folder / subject.dataset
        dataset = open_dataset(str(folder))
        view = ViewConfig(interpolation=subject.resize_filter)  # type: ignore[arg-type]
        settings = LoaderConfig(
            decoder=decoder,
            num_threads=setup.num_threads,
            hw_decoder_load=hw_decoder_load,
        )
        loader = Loader(
            dataset,
            view,
            ORDER,
            settings,
            seed=0,
            global_batch_size=setup.batch_size,
            micro_batch_size=setup.batch_size,
            device=torch.device(setup.device),
            dtype=torch.uint8,
        )
        return (batch.images_BCHW.shape[0] for batch in loader)

    return build


def bare_loop(setup: Setup, subject: Subject) -> Batches:
    """Decode, cut, resize and mirror in one thread, bytes and boxes ready beforehand: what no
    loader can beat."""
    folder = setup.folder / subject.dataset
    dataset = open_dataset(str(folder))
    sample_ids_B = np.arange(dataset.info.num_samples)
    rows = dataset.lookup(sample_ids_B)
    reader = ShardReader(dataset)
    images, _ = reader.read(rows)
    ids = np.arange(len(images))
    boxes = draw_boxes(
        ViewConfig(),
        seed=0,
        epochs_B=np.zeros_like(ids),
        sample_ids_B=ids,
        widths_B=rows.widths_B,
        heights_B=rows.heights_B,
    )
    # All that a loader does besides: reading, drawing boxes, memory for the batch.
    columns = (
        images,
        boxes.tops_B.tolist(),
        boxes.lefts_B.tolist(),
        boxes.heights_B.tolist(),
        boxes.widths_B.tolist(),
        boxes.flips_B.tolist(),
    )
    cuts = list(zip(*columns, strict=True))
    out_HW3 = np.empty((SIZE, SIZE, 3), np.uint8)
    # As in the decoder's own threads: autograd's bookkeeping costs as much as a flip.
    torch.set_grad_enabled(False)
    while True:
        for number, (image, top, left, height, width, flip) in enumerate(cuts, start=1):
            whole_HW3 = simplejpeg.decode_jpeg(image)
            cut_HW3 = whole_HW3[top : top + height, left : left + width]
            if subject.resize_filter == "area":
                cv2.resize(
                    cut_HW3, (SIZE, SIZE), dst=out_HW3, interpolation=cv2.INTER_AREA
                )
            else:
                # Packed: of rows that lie apart torch's kernel takes three times as long.
                packed_HW3 = torch.from_numpy(cut_HW3.copy())
                cut_1CHW = packed_HW3.unsqueeze(0).permute(0, 3, 1, 2)
                resized_1CHW = torch.nn.functional.interpolate(
                    cut_1CHW,
                    size=(SIZE, SIZE),
                    mode=subject.resize_filter,
                    antialias=True,
                )
                resized_HWC = resized_1CHW[0].permute(1, 2, 0)
                out_HW3[:] = resized_HWC.numpy()
            if flip:
                cv2.flip(out_HW3, 1, dst=out_HW3)
            if number % setup.batch_size == 0:
                yield setup.batch_size


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Draw a box (left, top, right, bottom) of 20-100% of the area, as RandomResizedCrop does."""
    for _ in range(10):
        area = width * height * random.uniform(MIN_AREA, 1.0)
        # Uniform in the logarithm: a box is as often twice as wide as it is twice as high.
        log_aspect = random.uniform(math.log(3 / 4), math.log(4 / 3))
        aspect = math.exp(log_aspect)
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = random.randint(0, width - w)
            top = random.randint(0, height - h)
            return left, top, left + w, top + h
    # torchvision falls back to a central box too.
    side = min(width, height)
    left = (width - side) // 2
    top = (height - side) // 2
    return left, top, left + side, top + side


def transform_with_pillow(image: Any) -> torch.Tensor:
    """Cut, resize and mirror a PIL image the usual way."""
    from PIL import Image

    box = random_box(*image.size)
    rgb = image.convert("RGB")
    cut = rgb.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels_HW3 = torch.from_numpy(np.array(cut))
    # Packed, as torchvision's transforms give it: workers send it through shared memory.
    return pixels_HW3.permute(2, 0, 1).contiguous()


class PillowFolder(torch.utils.data.Dataset):
    """A folder of images, opened with PIL: what most training scripts read."""

    def __init__(self, folder: Path) -> None:
        self._paths = sorted(folder.rglob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        from PIL import Image

        with Image.open(self._paths[index]) as image:
            return transform_with_pillow(image)


def torch_with_pillow(setup: Setup, subject: Subject) -> Batches:
    """Read through torch's DataLoader with worker processes."""
    dataset = PillowFolder(setup.folder / subject.dataset)
    # Without end: a new epoch would start the workers' queues anew in the middle of a turn.
    sampler = torch.utils.data.RandomSampler(
        dataset, replacement=True, num_samples=10**9
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        setup.batch_size,
        sampler=sampler,
        num_workers=setup.num_threads,
        persistent_workers=True,
    )
    return (len(batch) for batch in loader)


def webdataset_with_pillow(setup: Setup, subject: Subject) -> Batches:
    """Read tars through the webdataset library and torch's DataLoader."""
    import webdataset

    folder = setup.folder / subject.dataset
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    # `resampled` repeats shards without end. The buffer is small, so that it fills in the warm-up.
    dataset = (
        webdataset.WebDataset(tars, resampled=True, shardshuffle=False)
        .shuffle(256)
        .decode("pil")
        .to_tuple("jpg")
        .map_tuple(transform_with_pillow)
        .batched(setup.batch_size)
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=setup.num_threads
    )
    return (len(batch[0]) for batch in loader)


def dalis_own(setup: Setup, subject: Subject) -> Batches:
    """Read tars with DALI's reader, its shuffle buffer and its random crop; on a CUDA device with
    its mixed decoder."""
    dali: Any = import_module("nvidia.dali")
    fn: Any = import_module("nvidia.dali.fn")
    types: Any = import_module("nvidia.dali.types")
    folder = setup.folder / subject.dataset
    on_gpu = setup.device != "cpu"
    device_id = None
    backend = "cpu"
    if on_gpu:
        device_id = 0
        backend = "mixed"
    pipeline = dali.Pipeline(
        setup.batch_size,
        setup.num_threads,
        device_id=device_id,
        prefetch_queue_depth=2,
        seed=0,
    )
    # The two lists are paired by position: both are sorted, and the names differ in the ending.
    tars = []
    for path in sorted(folder.glob("*.tar")):
        tars.append(str(path))
    indices = []
    for path in sorted(folder.glob("*.idx")):
        indices.append(str(path))
    filters = {"bicubic": types.INTERP_CUBIC, "bilinear": types.INTERP_LINEAR}
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=indices,
            ext=["jpg"],
            random_shuffle=True,
            initial_fill=256,
            name="tars",
        )
        pixels = fn.decoders.image_random_crop(
            encoded,
            device=backend,
            output_type=types.RGB,
            random_area=[MIN_AREA, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
        )
        kind = filters[subject.resize_filter]
        pixels = fn.resize(pixels, size=[SIZE, SIZE], interp_type=kind, antialias=True)
        is_flipped = fn.random.coin_flip()
        pipeline.set_outputs(fn.flip(pixels, horizontal=is_flipped))
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        tensor = output.as_tensor()
        # A copy, as everybody needs who keeps a batch: DALI writes the next one to this memory.
        if on_gpu:
            batch = torch.utils.dlpack.from_dlpack(tensor).clone()
        else:
            batch = torch.from_numpy(np.array(tensor))
        yield len(batch)


def spdl_threads(setup: Setup, subject: Subject) -> Batches:
    """Read files with SPDL's pipeline: threads over FFmpeg, which cuts, resizes and mirrors in its
    filter graph."""
    io: Any = import_module("spdl.io")
    build: Any = import_module("spdl.pipeline").PipelineBuilder
    folder = setup.folder / subject.dataset
    paths = sorted(str(path) for path in folder.rglob("*.jpg"))

    def endless() -> Iterator[str]:
        while True:
            yield random.choice(paths)

    def decode(path: str) -> Any:
        area = random.uniform(MIN_AREA, 1.0)
        log_aspect = random.uniform(math.log(3 / 4), math.log(4 / 3))
        aspect = math.exp(log_aspect)
        # A box that does not fit is clipped: what RandomResizedCrop draws anew, FFmpeg's
        # expressions cannot.
        box = (
            f"crop=w=min(iw\\,sqrt(iw*ih*{area * aspect:.4f}))"
            f":h=min(ih\\,sqrt(iw*ih*{area / aspect:.4f}))"
            f":x=(iw-ow)*{random.random():.4f}:y=(ih-oh)*{random.random():.4f}:exact=1"
        )
        scale = f"scale={SIZE}:{SIZE}:flags={subject.resize_filter}"
        steps = [box, scale]
        if random.random() < 0.5:
            steps.append("hflip")
        steps.append("format=pix_fmts=rgb24")
        packets = io.demux_image(path)
        return io.decode_packets(packets, filter_desc=",".join(steps))

    pipeline = (
        build()
        .add_source(endless())
        .pipe(decode, concurrency=setup.num_threads)
        .aggregate(setup.batch_size)
        .pipe(io.convert_frames)
        .add_sink(3)
        .build(num_threads=setup.num_threads)
    )
    with pipeline.auto_stop():
        for batch in pipeline:
            pixels = io.to_numpy(batch)
            yield len(torch.from_numpy(pixels))


def ffcvs_own(setup: Setup, subject: Subject) -> Batches:
    """Read a beton with FFCV's Loader, random order, from the system's page cache."""
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    (path,) = (setup.folder / subject.dataset).glob("*.beton")
    dataset = open_dataset(str(path.parent))
    count = dataset.info.num_samples
    # Opened once and never closed: an epoch that is left early keeps a thread of FFCV's alive.
    decoder = RandomResizedCropRGBImageDecoder((SIZE, SIZE), scale=(MIN_AREA, 1.0))
    loader = FfcvLoader(
        str(path),
        batch_size=setup.batch_size,
        num_workers=setup.num_threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        # One long epoch: starting one costs FFCV time that a real dataset would spread over many
        # more images.
        indices=np.tile(np.arange(count), 400),
        pipelines={
            "image": [decoder, RandomHorizontalFlip(), ToTensor()],
            "label": None,
            "meta": None,
        },
    )
    while True:
        for (images,) in loader:
            yield len(images)


SUBJECTS = (
    Subject("torch DataLoader + PIL", "images", "bicubic", torch_with_pillow),
    Subject("webdataset + PIL", "originals", "bicubic", webdataset_with_pillow),
    Subject("DALI's own pipeline", "originals", "bicubic", dalis_own),
    Subject("maelstrom dali", "originals", "bicubic", ours("dali")),
    Subject("maelstrom turbo", "originals", "bicubic", ours("turbo")),
    Subject("bare loop", "originals", "bicubic", bare_loop),
    Subject("maelstrom turbo", "originals", "area", ours("turbo")),
    Subject("bare loop", "originals", "area", bare_loop),
    Subject("SPDL", "images", "bicubic", spdl_threads),
    Subject("maelstrom ffcv", "originals", "area", ours("ffcv")),
    Subject("DALI's own pipeline", "tar-256", "bicubic", dalis_own),
    Subject("maelstrom turbo", "tar-320", "bicubic", ours("turbo")),
    Subject("maelstrom turbo", "tar-256", "bicubic", ours("turbo")),
    Subject("maelstrom turbo", "tar-256", "area", ours("turbo")),
    Subject("FFCV Loader", "beton-512", "area", ffcvs_own),
    Subject("maelstrom turbo", "beton-512", "area", ours("turbo")),
    Subject("maelstrom ffcv", "beton-512", "area", ours("ffcv")),
    Subject("maelstrom turbo", "beton-512", "bicubic", ours("turbo")),
    Subject("FFCV Loader", "beton-256", "area", ffcvs_own),
    Subject("maelstrom turbo", "beton-256", "area", ours("turbo")),
    Subject("maelstrom ffcv", "beton-256", "area", ours("ffcv")),
    Subject("maelstrom turbo", "beton-256", "bicubic", ours("turbo")),
    Subject("FFCV Loader", "beton-256-raw", "area", ffcvs_own),
    Subject("maelstrom turbo", "beton-256-raw", "area", ours("turbo")),
    Subject("maelstrom ffcv", "beton-256-raw", "area", ours("ffcv")),
    Subject("maelstrom turbo", "beton-256-raw", "bicubic", ours("turbo")),
)
SHARES = (0.5, 0.65, 0.8, 1.0)
"""Shares of the JPEG engine that are tried on a GPU."""


def _dali_on_gpu() -> Iterator[Subject]:
    for dataset in ("originals", "tar-320", "tar-256"):
        for share in SHARES:
            name = f"maelstrom dali, engine {share}"
            yield Subject(name, dataset, "bicubic", ours("dali", share))


GPU_SUBJECTS = (
    Subject("DALI's own pipeline", "originals", "bicubic", dalis_own),
    *_dali_on_gpu(),
    Subject("maelstrom turbo", "originals", "bicubic", ours("turbo")),
    Subject("maelstrom turbo", "tar-320", "bicubic", ours("turbo")),
    Subject("maelstrom turbo", "tar-256", "bicubic", ours("turbo")),
    Subject("maelstrom ffcv", "beton-256", "area", ours("ffcv")),
    Subject("maelstrom turbo", "beton-256-raw", "area", ours("turbo")),
)
"""What is measured on a machine with a CUDA device; every subject leaves its batches there."""
