"""Labelled pictures for the demo: crops of the photographs that scikit-image and scikit-learn carry
in their wheels.

The class of a crop is the photograph it was cut from; training and held-out crops come from
separate halves of it. That is a labelled toy: it shows that the pipeline learns, not that it
generalises.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from pipeline import storage
from pipeline.errors import ConfigError, DataError

PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/brick.png",
    "skimage/data/camera.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/coins.png",
    "skimage/data/grass.png",
    "skimage/data/gravel.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/retina.jpg",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
    "sklearn/datasets/images/flower.jpg",
)
"""Named one by one: the same folders also hold text, logos and test patterns."""
PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
"""What is taken from a folder of one's own."""
VAL_SHARE = 0.1
"""Share of one's own pictures that is held out."""
MARKER = "pictures.json"
"""Written last into a finished folder of pictures, and the sign that it is finished."""


@dataclasses.dataclass(frozen=True)
class CropPlan:
    """How the photographs are cut.

    Attributes:
        size: side of a crop in pixels; larger than the model's input, so that random crops have
            room.
        train_stride: pixels between training crops; below `size` they overlap.
        max_side: photographs longer than this are shrunk to it first, in pixels.
        quality: JPEG quality, 1-100.
    """

    size: int = 96
    train_stride: int = 24
    max_side: int = 768
    quality: int = 95


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Two folders of pictures, ready to be converted.

    Attributes:
        train: folder of training pictures.
        val: folder of held-out pictures.
        num_train: how many.
        num_val: how many.
        num_classes: class folders; 0 where the pictures have no labels.
    """

    train: Path
    val: Path
    num_train: int
    num_val: int
    num_classes: int


def photo_path(name: str) -> Path:
    """Find a photograph in the installed wheels.

    Args:
        name: one of `PHOTOS`.

    Raises:
        ConfigError: where the package is not installed or does not hold the file.
    """
    package, _, inside = name.partition("/")
    spec = importlib.util.find_spec(package)
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / inside).is_file():
        raise ConfigError(
            f"the demo's photograph {name} is not there: install the demo extra (pip install -e "
            "'.[demo]'), "
            "or give a folder of pictures of your own with --src"
        )
    return folder / inside


def boxes(
    width: int, height: int, *, plan: CropPlan, half: str
) -> Iterator[tuple[int, int, int, int]]:
    """Give the crop boxes of one half of a photograph: the first along its longer side trains, the
    second is held out.

    Args:
        width: of the photograph, in pixels.
        height: of the photograph, in pixels.
        plan: size and stride.
        half: train or val.

    Yields:
        left, top, right, bottom in pixels.
    """
    left, top, right, bottom = 0, 0, width, height
    if width >= height:
        left, right = (0, width // 2) if half == "train" else (width // 2, width)
    else:
        top, bottom = (0, height // 2) if half == "train" else (height // 2, height)
    stride = plan.train_stride if half == "train" else plan.size
    for y in range(top, bottom - plan.size + 1, stride):
        for x in range(left, right - plan.size + 1, stride):
            yield x, y, x + plan.size, y + plan.size


def cut_photos(folder: Path, plan: CropPlan = CropPlan()) -> Pictures:
    """Cut the wheels' photographs into `folder/train/CLASS/*.jpg` and `folder/val/CLASS/*.jpg`.

    Done once: a finished folder of the same plan is left as it is.

    Args:
        folder: local folder of its own; made.
        plan: how to cut.

    Returns:
        The two folders and their counts.

    Raises:
        ConfigError: where a photograph is not installed.
    """
    settings: dict[str, object] = {"plan": dataclasses.asdict(plan), "photos": list(PHOTOS)}
    ready = _finished(folder, settings)
    if ready is not None:
        return ready
    counts = {"train": 0, "val": 0}
    for name in PHOTOS:
        photo = _open_photo(photo_path(name), max_side=plan.max_side)
        label = Path(name).stem
        for half in counts:
            (folder / half / label).mkdir(parents=True, exist_ok=True)
            for box in boxes(photo.width, photo.height, plan=plan, half=half):
                path = folder / half / label / f"{label}-{box[1]:04d}-{box[0]:04d}.jpg"
                photo.crop(box).save(path, quality=plan.quality, subsampling=0)
                counts[half] += 1
    return _finish(folder, settings, num_classes=len(PHOTOS), **counts)


def split_folder(source: Path, folder: Path) -> Pictures:
    """Split a folder of one's own pictures into training and held-out ones, by a hash of each name.

    The same picture always falls on the same side, however many are added later. Nothing is copied:
    the two folders hold links.

    Args:
        source: a flat folder, or one of class folders; nothing in it is changed.
        folder: local folder for the links.

    Raises:
        ConfigError: where `source` is no folder.
        DataError: where it holds fewer than two pictures.
    """
    if not source.is_dir():
        raise ConfigError(
            f"--src {source}: no such folder; give a folder of pictures or of class folders of "
            "pictures"
        )
    names = sorted(
        p.relative_to(source) for p in source.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES
    )
    if len(names) < 2:
        raise DataError(
            f"--src {source}: found {len(names)} pictures ({', '.join(sorted(PICTURE_SUFFIXES))}); "
            "at least 2 are "
            "needed, one to train on and one to hold out"
        )
    settings: dict[str, object] = {
        "source": str(source.resolve()),
        "names": _digest("\n".join(str(name) for name in names)),
    }
    ready = _finished(folder, settings)
    if ready is not None:
        return ready
    ranked = sorted(names, key=lambda name: _digest(name.as_posix()))
    limit = int(VAL_SHARE * 16**8)
    held_out = {name for name in ranked if int(_digest(name.as_posix())[:8], 16) < limit} or {
        ranked[0]
    }
    if len(held_out) == len(names):
        held_out = {ranked[0]}
    for half in ("train", "val"):
        shutil.rmtree(folder / half, ignore_errors=True)
        (folder / half).mkdir(parents=True)
    for name in names:
        link = folder / ("val" if name in held_out else "train") / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((source / name).resolve())
    classes = {name.parts[0] for name in names if len(name.parts) > 1}
    if any(len(name.parts) == 1 for name in names):
        classes = set()
    num_val = len(held_out)
    return _finish(
        folder, settings, train=len(names) - num_val, val=num_val, num_classes=len(classes)
    )


def _open_photo(path: Path, *, max_side: int) -> Image.Image:
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    photo.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return photo


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _finished(folder: Path, settings: dict[str, object]) -> Pictures | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return _pictures(folder, marker["counts"]) if marker["settings"] == settings else None


def _finish(
    folder: Path, settings: dict[str, object], *, train: int, val: int, num_classes: int
) -> Pictures:
    counts = {"num_train": train, "num_val": val, "num_classes": num_classes}
    marker = json.dumps({"settings": settings, "counts": counts}, indent=1) + "\n"
    storage.write_atomic(str(folder / MARKER), marker.encode())
    return _pictures(folder, counts)


def _pictures(folder: Path, counts: dict[str, int]) -> Pictures:
    return Pictures(train=folder / "train", val=folder / "val", **counts)
