"""Conversion in this process: order, labels, keys, sizes, and what is left out."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipeline import storage
from pipeline.convert.__main__ import main
from pipeline.convert.conversion import convert
from pipeline.convert.plan import make_plan
from pipeline.convert.settings import OPTION_NAMES, ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.images.encode import reencode
from pipeline.images.header import Probe, probe
from pipeline.images.refused import Reason, Refused
from pipeline.sources.folder import FolderSource
from pipeline.sources.listing import Listing, SourceSettings
from pipeline.sources.names import sample_keys

FEW = ConvertSettings(samples_per_shard=5)


@pytest.fixture
def source(make_class_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_class_folder(num_classes=3, per_class=4, root=tmp_path / "src")


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the members of every sample, by key, with tarfile as the reader."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                key, _, extension = member.name.partition(".")
                data = archive.extractfile(member)
                assert data is not None
                samples.setdefault(key, {})[extension] = data.read()
    return samples


def test_every_image_is_stored_as_it_is(source: Path, tmp_path: Path) -> None:
    info = convert(str(source), str(tmp_path / "dst"), FEW, workers=1)
    assert (info.num_samples, info.num_shards) == (12, 3)
    classes = sorted(path.name for path in source.iterdir())
    assert info.classes == classes
    samples = read_samples(tmp_path / "dst")
    assert len(samples) == 12
    for key, members in samples.items():
        folder, name = key.split("/")
        assert members["jpg"] == (source / folder / f"{name}.jpg").read_bytes()
        assert members["cls"] == str(classes.index(folder)).encode()
        assert json.loads(members["json"]) == {
            "filename": f"{key}.jpg",
            "class": folder,
        }
    manifest = open_dataset(str(tmp_path / "dst"))
    rows = manifest.lookup(np.arange(12))
    for key, label, width in zip(
        manifest.keys(np.arange(12)),
        rows.labels_B.tolist(),
        rows.widths_B.tolist(),
        strict=True,
    ):
        with Image.open(source / f"{key}.jpg") as image:
            assert (classes[label], width) == (key.split("/")[0], image.width)


def test_only_the_dataset_is_left(source: Path, tmp_path: Path) -> None:
    convert(str(source), str(tmp_path / "dst"), FEW, workers=1)
    shards = [f"train-00000{n}.{kind}" for n in range(3) for kind in ("idx", "tar")]
    neighbours = ["_info.json", "train-wids.json"]
    assert sorted(path.name for path in (tmp_path / "dst").iterdir()) == sorted(
        [*shards, *neighbours, "dataset.json", "manifest.parquet"]
    )


def test_the_neighbours_find_their_files(source: Path, tmp_path: Path) -> None:
    convert(str(source), str(tmp_path / "dst"), FEW, workers=1)
    wids = json.loads((tmp_path / "dst" / "train-wids.json").read_text())
    assert (wids["__kind__"], wids["wids_version"]) == ("wids-shard-index-v1", 1)
    for shard in wids["shardlist"]:
        assert shard["filesize"] == (tmp_path / "dst" / shard["url"]).stat().st_size
    assert [shard["nsamples"] for shard in wids["shardlist"]] == [5, 5, 2]
    timm = json.loads((tmp_path / "dst" / "_info.json").read_text())["splits"]["train"]
    assert timm["num_samples"] == sum(timm["shard_lengths"]) == 12
    assert timm["filenames"] == [shard["url"] for shard in wids["shardlist"]]


def test_the_order_is_the_seeds(source: Path, tmp_path: Path) -> None:
    def keys(seed: int | None) -> list[str]:
        name = f"memory://convert-order/{seed}-{tmp_path.name}"
        convert(str(source), name, ConvertSettings(shuffle_seed=seed), workers=1)
        return open_dataset(name).keys(np.arange(12))

    assert keys(None) == sorted(keys(0))
    assert keys(0) != keys(1)
    assert sorted(keys(0)) == sorted(keys(1))


def test_the_stored_order_is_pinned() -> None:
    # A dataset half made by one version must go on with the next.
    listing = Listing(
        "x",
        pa.array([f"{n}.jpg" for n in range(8)]),
        np.ones(8, np.int64),
        np.zeros(8, np.int32),
        None,
        {},
    )
    assert make_plan(listing, ConvertSettings(shuffle_seed=7)).order.tolist() == [
        4,
        1,
        6,
        3,
        2,
        7,
        5,
        0,
    ]


@given(
    sizes=st.lists(st.integers(0, 10**6), min_size=1, max_size=60),
    target=st.integers(1, 2 * 10**6),
    resize=st.sampled_from([None, 8, 224]),
)
def test_shards_cover_every_image_once(
    sizes: list[int], target: int, resize: int | None
) -> None:
    names = pa.array([f"{n:03d}.jpg" for n in range(len(sizes))])
    listing = Listing(
        "x", names, np.array(sizes), np.zeros(len(sizes), np.int32), None, {}
    )
    plan = make_plan(listing, ConvertSettings(shard_size_bytes=target, resize=resize))
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == len(sizes)
    assert (np.diff(plan.bounds) > 0).all()
    assert sorted(plan.order.tolist()) == list(range(len(sizes)))


def test_shards_are_about_as_large_as_asked(source: Path, tmp_path: Path) -> None:
    info = convert(
        str(source),
        str(tmp_path / "dst"),
        ConvertSettings(shard_size_bytes=20_000),
        workers=1,
    )
    sizes = [shard.size_bytes for shard in info.shards]
    assert len(sizes) > 2
    assert max(sizes) < 30_000 + 10_240


def test_a_limit_takes_the_first_of_the_stored_order(
    source: Path, tmp_path: Path
) -> None:
    convert(str(source), "memory://convert-limit/a", FEW, workers=1)
    convert(
        str(source),
        "memory://convert-limit/b",
        FEW.model_copy(update={"limit": 7}),
        workers=1,
    )
    whole = open_dataset("memory://convert-limit/a").keys(np.arange(12))
    assert open_dataset("memory://convert-limit/b").keys(np.arange(7)) == whole[:7]


def test_statistics_are_those_of_the_pixels(source: Path, tmp_path: Path) -> None:
    with Image.open(source / "astronaut" / "000.jpg") as image:
        image.convert("L").save(source / "astronaut" / "grey.jpg")
        image.save(source / "astronaut" / "p.png")
    (source / "astronaut" / "broken.png").write_bytes(
        (source / "astronaut" / "p.png").read_bytes()[:-900] + bytes(900)
    )
    settings = FEW.model_copy(update={"stats": True})
    info = convert(str(source), str(tmp_path / "dst"), settings, workers=1)
    found = json.loads((tmp_path / "dst" / "stats.json").read_text())
    images = []
    for path in source.rglob("*.*"):
        if path.name != "broken.png":
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB"), np.float64) / 255)
    mean = np.mean([image.mean((0, 1)) for image in images], 0)
    square = np.mean([(image**2).mean((0, 1)) for image in images], 0)
    assert (found["num_images"], found["num_undecodable"]) == (
        14,
        info.num_samples - 14,
    )
    np.testing.assert_allclose(found["mean"], mean, atol=1e-3)
    np.testing.assert_allclose(found["std"], np.sqrt(square - mean**2), atol=1e-3)
    assert sum(found["class_counts"].values()) == info.num_samples
    assert found["class_counts"]["chelsea"] == 4
    assert found["height"] == [64] * 7
    convert(str(source), str(tmp_path / "again"), settings, workers=2)
    assert (tmp_path / "again" / "stats.json").read_bytes() == (
        tmp_path / "dst" / "stats.json"
    ).read_bytes()


# ------------------------------------------------------------------------------------------ sources


def test_a_flat_folder_has_no_labels(source: Path, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    for number, path in enumerate(sorted(source.rglob("*.jpg"))):
        (tmp_path / "flat" / f"{number}.JPEG").write_bytes(path.read_bytes())
    info = convert(str(tmp_path / "flat"), str(tmp_path / "dst"), FEW, workers=1)
    assert info.classes is None
    assert (
        open_dataset(str(tmp_path / "dst")).lookup(np.arange(12)).labels_B.tolist()
        == [-1] * 12
    )
    assert all(
        "cls" not in members for members in read_samples(tmp_path / "dst").values()
    )


def test_the_first_folder_is_the_class(source: Path, tmp_path: Path) -> None:
    for path in sorted(source.iterdir()):
        (path / "deep").mkdir()
        for image in path.glob("*.jpg"):
            image.rename(path / "deep" / image.name)
    listing = FolderSource(str(source)).listing()
    assert listing.classes == sorted(path.name for path in source.iterdir())
    assert listing.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_images_beside_class_folders_need_a_word(source: Path) -> None:
    next(source.rglob("*.jpg")).rename(source / "stray.jpg")
    with pytest.raises(
        ConfigError,
        match=r"1 images beside its folders \(such as stray\.jpg\).*--labels none",
    ):
        FolderSource(str(source)).listing()
    assert (
        FolderSource(str(source), SourceSettings(labels="none")).listing().classes
        is None
    )


def test_hidden_and_other_files_are_passed_over(source: Path) -> None:
    (source / "README.txt").write_text("x")
    (source / "astronaut" / "._000.jpg").write_text("x")
    (source / ".git").mkdir()
    (source / ".git" / "a.jpg").write_text("x")
    listing = FolderSource(str(source)).listing()
    assert len(listing) == 12
    assert listing.passed_over == {".txt": 1, "hidden": 2}


def test_keys_are_unique_and_readable() -> None:
    names = ["a/x.JPG", "a/x.jpg", "a/x.png", "a.b/c d.e.JPG", "__m__/q.png", "ü/y.jpg"]
    keys = sample_keys(pa.array(names)).to_pylist()
    assert keys == ["a/x-jpg-0", "a/x-jpg-1", "a/x-png", "a_b/c_d_e", "_m__/q", "ü/y"]


@given(
    st.lists(
        st.text("ab._- -01/", min_size=1, max_size=8),
        min_size=1,
        max_size=30,
        unique=True,
    )
)
def test_keys_are_always_unique(stems: list[str]) -> None:
    names = sorted({f"{stem}.{kind}" for stem in stems for kind in ("jpg", "png")})
    keys = sample_keys(pa.array(names)).to_pylist()
    assert len(set(keys)) == len(names)
    assert not any("." in str(key) or " " in str(key) for key in keys)


# --------------------------------------------------------------------------------------- bad images


def test_bad_images_are_left_out_and_listed(source: Path, tmp_path: Path) -> None:
    folder = source / "astronaut"
    whole = (folder / "000.jpg").read_bytes()
    bad = {
        "a.jpg": b"",
        "b.png": b"junk",
        "c.jpg": whole[: len(whole) // 2],
        "d.gif": b"",
    }
    with Image.open(io.BytesIO(whole)) as image:
        image.save(folder / "d.gif")
    for name, data in bad.items():
        if name != "d.gif":
            (folder / name).write_bytes(data)
    (folder / "e.JPEG").write_bytes(
        (folder / "001.jpg").read_bytes()
    )  # a JPEG all the same
    info = convert(str(source), str(tmp_path / "dst"), FEW, workers=1)
    assert info.num_samples == 13
    rows = pq.read_table(tmp_path / "dst" / "rejected.parquet").to_pylist()
    assert sorted((row["key"], row["reason"]) for row in rows) == [
        ("astronaut/a.jpg", "empty"),
        ("astronaut/b.png", "not an image"),
        ("astronaut/c.jpg", "truncated"),
        ("astronaut/d.gif", "format needs --resize"),
    ]


def test_a_png_named_jpeg_is_stored_as_what_it_is(source: Path, tmp_path: Path) -> None:
    with Image.open(source / "astronaut" / "000.jpg") as image:
        image.save(source / "astronaut" / "p.png")
    (source / "astronaut" / "p.png").rename(source / "astronaut" / "p.JPEG")
    convert(str(source), str(tmp_path / "dst"), FEW, workers=1)
    assert "png" in read_samples(tmp_path / "dst")["astronaut/p"]


def test_a_shard_of_bad_images_is_no_shard(source: Path, tmp_path: Path) -> None:
    for path in (source / "astronaut").iterdir():
        path.write_bytes(b"")
    settings = ConvertSettings(samples_per_shard=2, shuffle_seed=None)
    info = convert(str(source), str(tmp_path / "dst"), settings, workers=1)
    assert (info.num_samples, info.num_shards) == (8, 4)
    assert info.shards[0].name == "train-000002.tar"
    open_dataset(str(tmp_path / "dst")).lookup(np.arange(8))


def test_strict_stops_at_the_first(source: Path, tmp_path: Path) -> None:
    (source / "astronaut" / "bad.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"astronaut/bad\.jpg: empty"):
        convert(
            str(source),
            str(tmp_path / "dst"),
            FEW.model_copy(update={"strict": True}),
            workers=1,
        )
    assert not (tmp_path / "dst" / "dataset.json").exists()
    assert convert(str(source), str(tmp_path / "dst"), FEW, workers=1).num_samples == 12


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    for number in range(3):
        (tmp_path / "src" / f"{number}.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"none of the 3 images.*not an image \(3\)"):
        convert(str(tmp_path / "src"), str(tmp_path / "dst"), workers=1)


# ----------------------------------------------------------------------------------------- resizing


def save(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shrink(data: bytes, side: int = 32) -> Image.Image:
    found = probe(data)
    assert isinstance(found, Probe)
    result = reencode(data, found, short_side=side, quality=90)
    assert isinstance(result, bytes), result
    return Image.open(io.BytesIO(result))


@pytest.fixture(scope="module")
def photo(photo_paths: dict[str, Path]) -> Image.Image:
    with Image.open(photo_paths["chelsea"]) as image:
        return image.convert("RGB").crop((100, 50, 228, 146))


def mean_difference(first: Image.Image, second: Image.Image) -> float:
    pairs = (np.asarray(image.convert("RGB"), np.float64) for image in (first, second))
    return float(np.abs(next(pairs) - next(pairs)).mean())


def test_the_shorter_side_is_what_was_asked_for(photo: Image.Image) -> None:
    small = shrink(save(photo, "PNG"))
    assert (small.format, small.size) == ("JPEG", (43, 32))
    assert mean_difference(small, photo.resize((43, 32), Image.Resampling.BICUBIC)) < 4


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGBA", "P", "LA", "1"])
def test_other_colours_become_rgb_or_grey(photo: Image.Image, mode: str) -> None:
    kind = "TIFF" if mode == "CMYK" else "PNG"
    small = shrink(save(photo.convert(mode), kind))
    assert small.mode == ("L" if mode in ("L", "LA", "1") else "RGB")
    expected = photo.convert("L") if small.mode == "L" else photo
    assert mean_difference(
        small, expected.resize((43, 32), Image.Resampling.BICUBIC)
    ) < (40 if mode == "1" else 12)


def test_a_cmyk_jpeg_keeps_its_colours(photo: Image.Image) -> None:
    small = shrink(save(photo.convert("CMYK"), "JPEG", quality=95))
    assert mean_difference(small, photo.resize((43, 32), Image.Resampling.BICUBIC)) < 6


def test_sixteen_bits_are_scaled_not_clipped(photo: Image.Image) -> None:
    grey = np.asarray(photo.convert("L"), np.uint16) * 257
    small = shrink(save(Image.fromarray(grey), "PNG"))
    assert (
        mean_difference(
            small, photo.convert("L").resize((43, 32), Image.Resampling.BICUBIC)
        )
        < 4
    )


def test_rotation_is_applied(photo: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    small = shrink(save(photo, "JPEG", exif=exif.tobytes(), quality=95))
    assert small.size == (32, 43)
    assert (
        mean_difference(
            small,
            photo.rotate(-90, expand=True).resize((32, 43), Image.Resampling.BICUBIC),
        )
        < 4
    )
    assert not small.getexif()


def test_a_colour_profile_is_converted(photo: Image.Image) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    small = shrink(save(photo, "JPEG", icc_profile=srgb, quality=95))
    assert "icc_profile" not in small.info
    assert mean_difference(small, photo.resize((43, 32), Image.Resampling.BICUBIC)) < 4
    broken = shrink(save(photo, "JPEG", icc_profile=b"ICC_PROFILE junk", quality=95))
    assert mean_difference(broken, small) < 4


def test_nothing_is_enlarged_and_fine_jpegs_keep_their_bytes(
    photo: Image.Image,
) -> None:
    data = save(photo, "JPEG")
    found = probe(data)
    assert isinstance(found, Probe)
    assert reencode(data, found, short_side=96, quality=50) == data
    assert shrink(save(photo, "PNG"), side=500).size == photo.size


def test_what_cannot_be_decoded_has_a_reason(photo: Image.Image) -> None:
    data = bytearray(save(photo, "PNG"))
    data[60:-20] = bytes(len(data) - 80)
    found = probe(bytes(data))
    assert isinstance(found, Probe)
    assert reencode(bytes(data), found, short_side=32, quality=90) == Refused(
        Reason.UNDECODABLE
    )


def test_resized_datasets_have_small_images_of_every_format(
    photo: Image.Image, tmp_path: Path
) -> None:
    (tmp_path / "src").mkdir()
    for kind in ("gif", "bmp", "tiff", "png", "webp", "jpg"):
        photo.save(tmp_path / "src" / f"{kind}.{kind}")
    info = convert(
        str(tmp_path / "src"),
        str(tmp_path / "dst"),
        ConvertSettings(resize=32),
        workers=1,
    )
    assert info.num_samples == 6
    assert set(info.versions) >= {"pillow", "libjpeg-turbo"}
    rows = open_dataset(str(tmp_path / "dst")).lookup(np.arange(6))
    assert rows.heights_B.tolist() == [32] * 6


# --------------------------------------------------------------------------------------- the target


def test_a_finished_conversion_is_left_alone(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    first = convert(str(source), str(dst), FEW, workers=1)
    before = {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in dst.iterdir()
    }
    assert convert(str(source), str(dst), FEW, workers=1) == first
    assert {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in dst.iterdir()
    } == before
    with pytest.raises(ConfigError, match="samples_per_shard was 5, is 4"):
        convert(str(source), str(dst), ConvertSettings(samples_per_shard=4), workers=1)
    next(source.rglob("*.jpg")).unlink()
    with pytest.raises(ConfigError, match="listing_sha256"):
        convert(str(source), str(dst), FEW, workers=1)


def test_an_interrupted_conversion_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, dst = tmp_path / "whole", tmp_path / "dst"
    convert(str(source), str(whole), FEW, workers=1)
    made: list[str] = []
    put = storage.write_atomic

    def stop_after_two_parts(uri: str, data: bytes) -> None:
        if len(made) == 2:
            raise KeyboardInterrupt
        put(uri, data)
        made.extend([uri] if "_parts" in uri else [])

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_atomic", stop_after_two_parts)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), str(dst), FEW, workers=1)
    kept = {path: path.stat().st_mtime_ns for path in dst.glob("*.tar")}
    (dst / ".train-000009.tar.tmp-1-abcdef").write_bytes(b"half a shard")
    with pytest.raises(
        ConfigError,
        match=r"unfinished conversion with other settings.*shuffle_seed was 0, is 1",
    ):
        convert(
            str(source), str(dst), FEW.model_copy(update={"shuffle_seed": 1}), workers=1
        )
    convert(str(source), str(dst), FEW, workers=1)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    untouched = [
        path for path, time_ns in kept.items() if path.stat().st_mtime_ns == time_ns
    ]
    assert len(untouched) == 2


@pytest.mark.parametrize("damage", ["part cut", "tar gone", "tar cut"])
def test_a_damaged_leftover_is_made_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    whole, dst = tmp_path / "whole", tmp_path / "dst"
    convert(str(source), str(whole), FEW, workers=1)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.convert.commit.write_dataset", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(str(source), str(dst), FEW, workers=1)
    part, tar = dst / "_parts" / "train-000001.parquet", dst / "train-000001.tar"
    if damage == "part cut":
        part.write_bytes(part.read_bytes()[:-9])
    elif damage == "tar gone":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:-512])
    convert(str(source), str(dst), FEW, workers=1)
    assert {path.name: path.read_bytes() for path in dst.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


def test_somebody_elses_folder_is_not_touched(source: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty.*thesis\.tex"):
        convert(str(source), str(dst), FEW, workers=1)
    assert [path.name for path in dst.iterdir()] == ["thesis.tex"]


def test_a_target_in_the_source_is_refused(source: Path) -> None:
    for target in (source, source / "shards"):
        with pytest.raises(ConfigError, match="lies in the source"):
            convert(str(source), str(target), FEW, workers=1)
    assert not (source / "shards").exists()


def test_two_conversions_into_one_folder(source: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    dst = tmp_path / "dst"
    dst.mkdir()
    with (
        FileLock(dst / "_lock"),
        pytest.raises(ConfigError, match="another conversion"),
    ):
        convert(str(source), str(dst), FEW, workers=1)


# --------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MB", 256 * 10**6), ("1.5GiB", 3 * 2**29), ("1000", 1000), (" 2 kb ", 2000)],
)
def test_sizes_are_read(
    source: Path,
    tmp_path: Path,
    text: str,
    size: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(
        [str(source), str(tmp_path / "dst"), "--shard-size", text, "--workers", "1"]
    )
    assert code == 0, capsys.readouterr().err
    plan = json.loads((tmp_path / "dst" / "dataset.json").read_text())["made_by"][
        "plan"
    ]
    assert plan["settings"]["shard_size_bytes"] == size


@pytest.mark.parametrize("text", ["", "MB", "12 apples", "-5MB", "1e9"])
def test_what_is_not_a_size_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / "dst"), f"--shard-size={text}"]) == 2
    message = capsys.readouterr().err
    assert f"--shard-size {text!r}: is not a valid size. Write it as 256MB" in message


@pytest.mark.parametrize(
    ("text", "seed"),
    [("none", None), ("NONE", None), ("0", 0), (str(2**64 - 1), 2**64 - 1)],
)
def test_seeds_are_read(text: str, seed: int | None) -> None:
    assert ConvertSettings(shuffle_seed=text).shuffle_seed == seed


@pytest.mark.parametrize("text", ["", "-1", str(2**64), "0x1", "nil"])
def test_what_is_not_a_seed_is_refused(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), str(tmp_path / "dst"), f"--shuffle-seed={text}"]) == 2
    assert f"--shuffle-seed {text!r}: is not a valid seed" in capsys.readouterr().err


def test_every_setting_has_an_option_with_its_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    for name, field in ConvertSettings.model_fields.items():
        if name == "limits":
            continue
        option = OPTION_NAMES.get(name, name).replace("_", "-")
        assert f"--{option} " in shown
        assert field.description, f"{name} has no text under it"
        assert str(field.description).split()[0] in shown


def test_the_plan_file_of_version_1_is_pinned() -> None:
    # An unfinished conversion continues only if these bytes stay the same.
    plain = [
        ("labels", "auto"),
        ("format", "webdataset"),
        ("shard_size_bytes", 256_000_000),
        ("samples_per_shard", None),
        ("resize", None),
        ("quality", 90),
        ("shuffle_seed", 0),
        ("split", "train"),
        ("limit", None),
        (
            "limits",
            {"max_pixels": 178956970, "max_bytes": 268435456, "max_aspect": 100.0},
        ),
    ]
    assert list(ConvertSettings().describe().items()) == plain
    smart = ConvertSettings(
        format="ffcv", write_mode="smart", stats=True, max_resolution=512
    )
    assert [name for name in smart.describe() if name not in dict(plain)] == [
        "write_mode",
        "smart_threshold_bytes",
        "max_resolution",
        "stats",
    ]
    assert type(smart.describe()["smart_threshold_bytes"]) is int
