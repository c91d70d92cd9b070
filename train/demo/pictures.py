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
Made = dict[str, object]
"""What a folder of pictures was made from; another one is made anew."""
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
        num_classes: class folders; 0 if the pictures have no labels.
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
        ConfigError: the package is not installed or does not hold the file.
    """
    package, _, inside = name.partition("/")
    # Looked up and not imported: scikit-image takes a second, and only its files are wanted.
    spec = importlib.util.find_spec(package)
    folder = None
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).parent
    if folder is None or not (folder / inside).is_file():
        raise ConfigError(
            f"the demo's photograph {name} is not there: install the demo extra "
            "(pip install -e '.[demo]'), or give a folder of your own pictures with --src"
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
    trains = half == "train"
    left, top = 0, 0
    right, bottom = width, height
    # Along the longer side, so that both halves have room for crops.
    if width >= height and trains:
        right = width // 2
    elif width >= height:
        left = width // 2
    elif trains:
        bottom = height // 2
    else:
        top = height // 2

    # Training crops overlap; held-out ones do not, for each counts as one image in a figure.
    if trains:
        stride = plan.train_stride
    else:
        stride = plan.size
    last_top = bottom - plan.size
    last_left = right - plan.size
    for y in range(top, last_top + 1, stride):
        for x in range(left, last_left + 1, stride):
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
        ConfigError: a photograph is not installed.
    """
    cutting = dataclasses.asdict(plan)
    settings: Made = {"plan": cutting, "photos": list(PHOTOS)}
    ready = _finished(folder, settings)
    if ready is not None:
        return ready

    counts = {"train": 0, "val": 0}
    for name in PHOTOS:
        photo = _open_photo(photo_path(name), max_side=plan.max_side)
        label = Path(name).stem
        for half in counts:
            class_folder = folder / half / label
            class_folder.mkdir(parents=True, exist_ok=True)
            for box in boxes(photo.width, photo.height, plan=plan, half=half):
                # By place, not by number: another stride does not give old names new crops.
                left, top, _, _ = box
                place = f"{top:04d}-{left:04d}"
                name_of_crop = f"{label}-{place}.jpg"
                path = class_folder / name_of_crop
                # Full colour resolution: the crops are small, and are shrunk once more.
                crop = photo.crop(box)
                crop.save(path, quality=plan.quality, subsampling=0)
                counts[half] += 1
    return _finish(folder, settings, num_classes=len(PHOTOS), **counts)


def split_folder(source: Path, folder: Path) -> Pictures:
    """Split a folder of one's own pictures into training and held-out ones, by a hash of each name.

    The same picture always falls on the same side, however many are added later. Pictures are not
    copied: the two folders hold links.

    Args:
        source: a flat folder, or one of class folders; it is not changed.
        folder: local folder for the links.

    Raises:
        ConfigError: `source` is not a folder.
        DataError: it holds fewer than two pictures.
    """
    if not source.is_dir():
        raise ConfigError(
            f"--src {source}: no such folder; give a folder of pictures or of class folders of "
            "pictures"
        )
    names = _picture_names(source)
    if len(names) < 2:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        raise DataError(
            f"--src {source}: found {len(names)} pictures ({suffixes}); at least 2 are needed, one "
            "to train on and one to hold out"
        )
    all_names = "\n".join(str(name) for name in names)
    settings: Made = {
        "source": str(source.resolve()),
        "names": _digest(all_names),
    }
    ready = _finished(folder, settings)
    if ready is not None:
        return ready

    # Links of an earlier split may point to pictures that are gone.
    for half in ("train", "val"):
        shutil.rmtree(folder / half, ignore_errors=True)
        (folder / half).mkdir(parents=True)

    held_out = _choose_held_out(names)
    for name in names:
        half = "train"
        if name in held_out:
            half = "val"
        link = folder / half / name
        link.parent.mkdir(parents=True, exist_ok=True)
        # Absolute, so that the links hold wherever the run's folder is.
        target = source / name
        link.symlink_to(target.resolve())
    num_val = len(held_out)
    num_train = len(names) - num_val
    num_classes = _count_classes(names)
    return _finish(
        folder, settings, train=num_train, val=num_val, num_classes=num_classes
    )


def _picture_names(source: Path) -> list[Path]:
    """Find the pictures below a folder, as paths relative to it, in a fixed order."""
    names = []
    for path in source.rglob("*"):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            names.append(path.relative_to(source))
    return sorted(names)


def _choose_held_out(names: list[Path]) -> set[Path]:
    """Choose about a tenth by a hash of each name; at least one, and not all."""
    # Python's own hash of a text is another one in every process.
    digests = {name: _digest(name.as_posix()) for name in names}
    # The first eight hexadecimal digits are a number below 16^8.
    limit = int(VAL_SHARE * 16**8)
    held_out = set()
    for name, digest in digests.items():
        if int(digest[:8], 16) < limit:
            held_out.add(name)
    if not held_out or len(held_out) == len(names):
        lowest = min(names, key=lambda name: digests[name])
        return {lowest}
    return held_out


def _count_classes(names: list[Path]) -> int:
    """Count class folders; 0 if any picture lies beside them, for then there are no labels."""
    if any(len(name.parts) == 1 for name in names):
        return 0
    classes = {name.parts[0] for name in names}
    return len(classes)


def _open_photo(path: Path, *, max_side: int) -> Image.Image:
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    # In place, and only if it is larger: small photographs are not enlarged.
    photo.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return photo


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _finished(folder: Path, settings: Made) -> Pictures | None:
    path = folder / MARKER
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if marker["settings"] != settings:
        return None
    return _pictures(folder, marker["counts"])


def _finish(
    folder: Path, settings: Made, *, train: int, val: int, num_classes: int
) -> Pictures:
    counts = {"num_train": train, "num_val": val, "num_classes": num_classes}
    content = {"settings": settings, "counts": counts}
    text = json.dumps(content, indent=1) + "\n"
    # Half a marker would be taken for a finished folder of other settings, and cut again.
    marker = folder / MARKER
    storage.write_atomic(str(marker), text.encode())
    return _pictures(folder, counts)


def _pictures(folder: Path, counts: dict[str, int]) -> Pictures:
    return Pictures(train=folder / "train", val=folder / "val", **counts)
