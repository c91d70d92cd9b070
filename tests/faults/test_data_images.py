"""Strange images under the real loader: decoded as documented by every decoder, or replaced before
they cost memory."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import LoaderConfig, ViewConfig
from pipeline.dataset import open_dataset
from pipeline.loader import read_samples
from tests import launch

DECODERS = ["dali", "turbo", "ffcv"]
VIEW = ViewConfig(height=48, width=48, crop="center")
FILTER = {"dali": "bicubic", "turbo": "bicubic", "ffcv": "area"}
CPU = torch.device("cpu")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(folder: Path, members: dict[str, bytes]) -> str:
    folder.mkdir()
    with tarfile.open(folder / "photos.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(folder)


def declaring(image: bytes, width: int, height: int) -> bytes:
    """Give a JPEG whose header tells of another size."""
    at = image.index(b"\xff\xc0") + 5
    return image[:at] + struct.pack(">HH", height, width) + image[at + 4 :]


def png_declaring(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data))
            + kind
            + data
            + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9)))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def expected_pixels(image: Image.Image) -> np.ndarray:
    """Cut the largest centred square and resize it, as the view does, with Pillow alone."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC)).astype(float)


def seen_pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images_BCHW.permute(0, 2, 3, 1) * std + mean) * 255).numpy()


@pytest.fixture
def strange(crops):
    """Give members of a tar by name, and what each shows: stored pixels, transparency dropped, the
    first frame."""
    # One photograph each: a substitute would be another picture.
    photos = [Image.open(io.BytesIO(crop)).convert("RGB") for crop in crops[::5]]
    grey = photos[1].convert("L")
    sixteen = photos[2].convert("L")
    palette = photos[3].quantize(64)
    clear = photos[4].copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    # A square: any other shape, turned, would lie outside its box, and a fallback would hide that
    # it was turned.
    photos[5] = photos[5].crop((0, 0, 60, 60))
    turned = Image.Exif()
    turned[0x0112] = 6
    upside_down = photos[6].transpose(Image.Transpose.FLIP_TOP_BOTTOM)

    def jpeg(number: int, **options: object) -> tuple[bytes, Image.Image, float]:
        return (
            encode(photos[number], "JPEG", quality=95, **options),
            photos[number],
            4.0,
        )

    def lossless(
        image: Image.Image, shown: Image.Image, kind: str = "PNG", **options: object
    ):
        return encode(image, kind, **options), shown, 1.5

    return {
        "cmyk.jpg": (
            encode(photos[0].convert("CMYK"), "JPEG", quality=95),
            photos[0],
            8.0,
        ),
        "grey.jpg": (encode(grey, "JPEG", quality=95), grey, 4.0),
        "sixteen.png": lossless(
            Image.fromarray(np.asarray(sixteen).astype(np.uint16) * 257), sixteen
        ),
        "palette.png": lossless(palette, palette.convert("RGB"), transparency=3),
        "alpha.png": lossless(clear, photos[4]),
        "rotated.jpg": jpeg(5, exif=turned.tobytes()),
        "animated.webp": lossless(
            photos[6],
            photos[6],
            "WEBP",
            save_all=True,
            append_images=[upside_down],
            lossless=True,
        ),
        "really_a_png.JPEG": lossless(photos[7], photos[7]),
        "UPPER.JPG": jpeg(8),
        "größe_写真.jpg": jpeg(9),
        "progressive.jpg": jpeg(10, progressive=True),
    }


@pytest.mark.parametrize("decoder", DECODERS)
def test_strange_images_show_what_is_documented(strange, tmp_path, decoder):
    folder = write_tar(
        tmp_path / "data", {name: data for name, (data, _, _) in strange.items()}
    )
    dataset = open_dataset(folder, cache_dir=tmp_path / "cache")
    assert dataset.info.num_samples == len(strange)
    keys = dataset.keys(np.arange(len(strange)))
    assert keys == [name.rsplit(".", 1)[0] for name in strange]
    view = VIEW.model_copy(update={"interpolation": FILTER[decoder]})
    batch = read_samples(
        dataset,
        np.arange(len(strange)),
        view,
        LoaderConfig(decoder=decoder),
        device=CPU,
    )
    for name, seen in zip(strange, seen_pixels(batch.images_BCHW), strict=True):
        _, shown, tolerance = strange[name]
        tolerance += 4.0 if decoder == "ffcv" else 0.0  # compared with bicubic pixels
        assert np.abs(seen - expected_pixels(shown)).mean() < tolerance, name


LOAD = """
import json, pathlib, sys
import numpy as np
import torch
from pipeline.config import LoaderConfig, ViewConfig
from pipeline.loader import read_samples
from pipeline.dataset import open_dataset

def peak_mb():
    # Not ru_maxrss: a child starts with its parent's, which would hide a rise.
    return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

def load(ids):
    settings = LoaderConfig(decoder=sys.argv[2], num_threads=2)
    view = ViewConfig(height=48, width=48, interpolation=sys.argv[3])
    return read_samples(dataset, np.array(ids), view, settings, device=torch.device("cpu"))

dataset = open_dataset(sys.argv[1])
load([1])
before_mb = peak_mb()
ids = list(range(dataset.info.num_samples))
batch = load(ids)
print(json.dumps({"rise_mb": peak_mb() - before_mb, "shape": list(batch.images_BCHW.shape)}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("manifest", ["true", "false"])
def test_bombs_are_replaced_before_they_are_decoded(
    crops, make_dataset, tmp_path, decoder, manifest
):
    """Both where the manifest tells of the size, and where the file was exchanged for a bomb behind
    its back."""
    bombs = {0: declaring(crops[0], 20_000, 20_000), 2: png_declaring(30_000, 30_000)}
    bombs |= {4: declaring(crops[4], 20_000, 20_000), 6: png_declaring(30_000, 30_000)}
    if manifest == "true":
        images = {f"{n:03d}.jpg": bombs.get(n, crops[n]) for n in range(8)}
        folder = write_tar(tmp_path / "data", images)
        open_dataset(folder, cache_dir=tmp_path / "cache")
    else:
        folder = make_dataset((8,), replace=bombs)
    env = launch.environment() | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = launch.run(["-c", LOAD, folder, decoder, FILTER[decoder]], env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["shape"] == [8, 3, 48, 48]
    assert found["rise_mb"] < 300
