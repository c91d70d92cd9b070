"""Labels kept apart from the images: text files as people have them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.errors import DataError
from pipeline.sources.ground_truth import read_ground_truth

IMAGES = pa.array(["x/a.jpg", "x/b.jpg"])
TEXTS = {
    "names and classes": "a.jpg dog\nb.jpg cat\n",
    "commas": "a.jpg, dog\nb.jpg ,cat\n",
    "tabs": "b\tcat\na\tdog\n",
    "Windows": "a.jpg,dog\r\nb.jpg,cat\r\n",
    "byte order mark": "\ufeffa.jpg,dog\nb.jpg,cat\n",
    "mark and header": "\ufefffile_name,label\na.jpg,dog\nb.jpg,cat\n",
    "a header": "image_id,label\na,dog\nb,cat\n",
    "another header": "Path Class\na.jpg dog\nb.jpg cat\n",
    "twice the same": "a.jpg,dog\nb.jpg,cat\na.jpg,dog\n",
    "blank lines": "\n\na.jpg,dog\n\nb.jpg,cat\n\n",
    "in order": "dog\ncat\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_text_in_any_spelling(tmp_path: Path, text: str) -> None:
    (tmp_path / "truth.txt").write_bytes(text.encode())
    labels, classes = read_ground_truth(str(tmp_path / "truth.txt")).label(IMAGES)
    assert classes == ["cat", "dog"]
    assert labels.tolist() == [1, 0]


def test_two_classes_for_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "truth.csv").write_text("x/a.jpg,dog\ny/a.jpg,cat\n")
    with pytest.raises(DataError, match="gives 'a' the classes 'dog' and 'cat'"):
        read_ground_truth(str(tmp_path / "truth.csv"))


def test_another_encoding_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "truth.txt").write_bytes(
        "a.jpg dog\nb.jpg caf\u00e9\n".encode("latin-1")
    )
    with pytest.raises(DataError, match=r"not a text file in UTF-8 .line 2: byte 0xe9"):
        read_ground_truth(str(tmp_path / "truth.txt"))


@pytest.mark.parametrize("name", ["devkit.TAR.GZ", "devkit.Tgz", "devkit.TAR"])
def test_a_devkit_is_known_by_any_spelling(tmp_path: Path, name: str) -> None:
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("2\n1\n")
    (tmp_path / "ids.txt").write_text("1 cat\n2 dog\n")
    with tarfile.open(
        tmp_path / name, "w" if name.endswith("TAR") else "w:gz"
    ) as archive:
        path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
        archive.add(path, f"devkit/{path.name}")
    truth = read_ground_truth(str(tmp_path / name), str(tmp_path / "ids.txt"))
    assert truth.label(IMAGES)[0].tolist() == [1, 0]
