"""The house keeps its rules: one root, strict markers, arrows, pure modules, real photographs, no stray process."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image


def test_photos_are_fifteen_real_photographs(photos: dict[str, bytes]) -> None:
    assert len(photos) == 15
    for stem, data in photos.items():
        with Image.open(BytesIO(data)) as image:
            assert image.format == "JPEG"
            assert min(image.size) >= 300
            assert len(image.convert("L").histogram()) == 256, stem


def test_class_folder_holds_varied_sizes_and_every_class(class_folder: Path) -> None:
    files = sorted(class_folder.rglob("*.jpg"))
    assert len(files) == 32
    assert len({path.parent.name for path in files}) == 4
    sizes = set()
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
    assert len(sizes) >= 4


def test_make_class_folder_refuses_more_crops_than_a_photograph_holds(make_class_folder: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="disjoint crops"):
        make_class_folder(num_classes=1, per_class=1000)


@pytest.mark.remote
def test_s3_server_stores_and_serves(s3_server: object, s3_bucket: str) -> None:
    import boto3

    bucket = s3_bucket.removeprefix("s3://")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a", Body=b"0123456789")
    assert client.get_object(Bucket=bucket, Key="a", Range="bytes=2-4")["Body"].read() == b"234"
