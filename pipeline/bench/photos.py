"""The datasets of the loader benchmark: about 1,500 JPEG crops of real photographs, in every
container and size."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.errors import ConfigError

# By name, because the folders also hold text, logos and drawings. The order decides which crop
# comes from which photograph, and so every figure.
PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/ihc.png",
    "skimage/data/rocket.jpg",
    "skimage/data/motorcycle_left.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/retina.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)
"""Colour photographs in the wheels of scikit-image and scikit-learn (extra `demo`)."""
_QUALITY = 97
"""JPEG quality at which a crop of 500 x 375 pixels takes about 100 kB, as ImageNet's images do."""
_SAMPLES_PER_SHARD = 256
VARIANTS: dict[str, ConvertSettings] = {
    "originals": ConvertSettings(samples_per_shard=_SAMPLES_PER_SHARD),
    "tar-320": ConvertSettings(samples_per_shard=_SAMPLES_PER_SHARD, resize=320),
    "tar-256": ConvertSettings(samples_per_shard=_SAMPLES_PER_SHARD, resize=256),
    "beton-512": ConvertSettings(
        format="ffcv", shard_size_bytes=2**40, max_resolution=512
    ),
    "beton-256": ConvertSettings(
        format="ffcv", shard_size_bytes=2**40, max_resolution=256
    ),
    "beton-256-raw": ConvertSettings(
        format="ffcv", shard_size_bytes=2**40, max_resolution=256, write_mode="raw"
    ),
}
"""What is made of the photographs. Betons are one file: FFCV's Loader opens one."""


def make_sources(
    folder: Path, *, num_images: int = 1536, variants: Collection[str] = tuple(VARIANTS)
) -> dict[str, Path]:
    """Make the benchmark's images and datasets unless they are there; return their folders by
    name.

    Args:
        folder: Folder to make them in.
        num_images: How many photographs.
        variants: Which datasets to make of them.

    Raises:
        ConfigError: The photographs are not installed.
    """
    images = folder / "images"
    # A mark of its own: the folder is there from the first image on, also of a run that stopped.
    done = folder / f"images-{num_images}.done"
    if not done.exists():
        write_crops(images, num_images)
        done.touch()
    made = {"images": images}
    # A finished conversion is found and left as it is.
    for name in variants:
        made[name] = folder / name
        convert(str(images), str(made[name]), VARIANTS[name])
    return made


def write_crops(folder: Path, count: int) -> None:
    """Write the crops as files of a class folder, ten classes in turn."""
    for number, data in enumerate(make_crops(count)):
        class_folder = folder / f"{number % 10}"
        path = class_folder / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def make_crops(count: int) -> Iterator[bytes]:
    """Yield JPEGs of about 500 x 375 pixels: pieces of the photographs at scales from 0.7 to
    1.3."""
    from PIL import Image

    sources = []
    for path in _photo_paths():
        photo = Image.open(path)
        sources.append(photo.convert("RGB"))
    # The same images on every machine, so that figures of two machines compare.
    rng = np.random.default_rng(0)
    for number in range(count):
        image = sources[number % len(sources)]
        image_size = np.array(image.size)
        # Around ImageNet's usual 500 x 375.
        width = rng.integers(420, 581)
        height = rng.integers(320, 431)
        size = np.array([width, height])
        # Some stand upright, as in every collection of photographs.
        if rng.random() < 0.25:
            size = size[::-1]
        scale = rng.uniform(0.7, 1.3)
        # Some photographs are smaller than what a crop asks for: then more is enlarged.
        region = np.minimum(size / scale, image_size)
        room = image_size - region
        corner = rng.random(2) * room
        left, top = corner.tolist()
        right = left + region[0]
        bottom = top + region[1]
        box = (left, top, right, bottom)
        width, height = size.tolist()
        crop_size = (width, height)
        crop = image.resize(crop_size, Image.Resampling.BICUBIC, box=box)
        buffer = io.BytesIO()
        crop.save(buffer, "JPEG", quality=_QUALITY)
        yield buffer.getvalue()


def _photo_paths() -> Iterator[Path]:
    for name in PHOTOS:
        package, _, inner = name.partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(
                f"bench: the photographs are in the package {package}, which is not installed. "
                "Install the extra: pip install -e '.[demo]' -c constraints.txt"
            )
        yield Path(spec.origin).parent / inner
