"""Which column of a table holds the images: odd names, records in records, lists, paths alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.errors import ConfigError, DataError
from pipeline.images.refused import Refused
from pipeline.sources.choose import find_kind, open_source
from pipeline.sources.listing import SourceSettings


def given(src: Path, **settings: Any) -> list[tuple[str, bytes | str]]:
    """Give name and bytes (or the reason why there are none) of a source's images."""
    source = open_source(str(src), SourceSettings(**settings))
    listing = source.listing()
    wanted = listing.wanted(np.arange(len(listing)))
    read = zip(wanted.names, source.read_all(wanted), strict=True)
    return [(n, str(data) if isinstance(data, Refused) else data) for n, data in read]


def wrote(folder: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = folder / "x.parquet"
    pq.write_table(pa.table(columns), path, **{"row_group_size": 1, **options})
    return path


RECORDS = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": b"two", "path": "2.jpg"}]
NUMBERED = [("x/00000000", b"one"), ("x/00000001", b"two")]
NAMED = [("1.jpg", b"one"), ("2.jpg", b"two")]
ODD_NAMES = [
    "my.image",
    "a.b.c",
    "image.bytes",
    "im age",
    "image[0]",
    "\u56fe\u50cf",
    "a/b",
    ".",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("kind", ["record", "bytes"])
def test_a_column_of_any_name(tmp_path: Path, name: str, kind: str) -> None:
    values = RECORDS if kind == "record" else [b"one", b"two"]
    path = wrote(tmp_path, {"id": [1, 2], name: values, "label": [3, 4]})
    expected = NAMED if kind == "record" else NUMBERED
    assert given(path) == expected
    assert given(path, image_column=name) == expected
    assert open_source(str(path)).listing().labels.tolist() == [3, 4]


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view()],
    ids=["binary", "large", "view"],
)
def test_bytes_of_any_type(tmp_path: Path, kind: Any) -> None:
    assert (
        given(wrote(tmp_path, {"image": pa.array([b"one", b"two"], kind)})) == NUMBERED
    )
    record = pa.struct([("path", pa.large_string()), ("bytes", kind)])
    assert (
        given(wrote(tmp_path, {"photo": pa.array(RECORDS, record)}, row_group_size=9))
        == NAMED
    )


NESTED = {
    "a record in a record": [{"image": record, "id": 1} for record in RECORDS],
    "bytes in a record": [{"id": 1, "jpg": record["bytes"]} for record in RECORDS],
    "two records deep": [{"a.b": {"picture": record}} for record in RECORDS],
}


@pytest.mark.parametrize("values", NESTED.values(), ids=NESTED)
def test_records_in_records(tmp_path: Path, values: list[Any]) -> None:
    path = wrote(tmp_path, {"sample": values, "label": [3, 4]})
    found = given(path)
    assert [data for _, data in found] == [b"one", b"two"]
    assert found in (NUMBERED, NAMED)


def test_a_column_counts_before_a_record(tmp_path: Path) -> None:
    columns = {"sample": [{"image": r} for r in RECORDS], "content": [b"one", b"two"]}
    path = wrote(tmp_path, columns)
    assert given(path) == NUMBERED
    assert given(path, image_column="sample.image") == NAMED


def test_bytes_beside_urls_in_a_record_are_no_image(tmp_path: Path) -> None:
    columns = {"url": ["https://h/a.jpg"], "meta": [{"embedding": b"x"}]}
    assert find_kind(str(wrote(tmp_path, columns)), SourceSettings()) == "list"


def test_a_name_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array([b"one"]), pa.array([b"two"]), pa.array([b"three"])]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays(columns, ["image", "image", "png"]), path)
    with pytest.raises(ConfigError, match=r"2 columns called 'image'.*--image-column"):
        given(path)
    assert given(path, image_column="png") == [("x/00000000", b"three")]
    both = {"image": [RECORDS[0]], "image.bytes": [b"x"]}
    with pytest.raises(ConfigError, match=r"2 columns .*image\.bytes"):
        given(wrote(tmp_path, both))


LISTS = {
    "records": [RECORDS, RECORDS[:1]],
    "bytes": [[b"one"], [b"two"]],
    "paths": [["a.jpg"], ["b.jpg"]],
    "records of paths": [[{"bytes": None, "path": "a.jpg"}], []],
}


@pytest.mark.parametrize("values", LISTS.values(), ids=LISTS)
@pytest.mark.parametrize("name", ["images", "image"])
def test_lists_of_images_are_explained(
    tmp_path: Path, name: str, values: list[Any]
) -> None:
    path = wrote(tmp_path, {name: values, "label": [3, 4]})
    said = rf"Column '{name}' holds a list of images in each row.*explode"
    with pytest.raises((ConfigError, DataError), match=said):
        given(path)
    with pytest.raises((ConfigError, DataError), match=said):
        given(path, image_column=name)


def test_lists_beside_an_image_are_no_hindrance(tmp_path: Path) -> None:
    path = wrote(tmp_path, {"images": [RECORDS, RECORDS], "image": RECORDS})
    assert given(path) == NAMED


# ----------------------------------------------------------------------------------- paths alone


@pytest.mark.parametrize("with_statistics", [True, False])
@pytest.mark.parametrize("name", ["image", "my.image"])
def test_records_of_paths_alone_are_a_list(
    tmp_path: Path, name: str, with_statistics: bool
) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": path} for path in ("a.jpg", "gone.jpg", None)]
    columns = {name: pa.array(rows, kind), "label": ["b", "a", "a"]}
    path = wrote(tmp_path, columns, write_statistics=with_statistics)
    expected = [
        ("a.jpg", b"one"),
        ("gone.jpg", "not found"),
        ("x.parquet row 3", "no path or URL"),
    ]
    assert given(path, image_column=name) == expected
    if name == "image":
        assert given(path) == expected


@pytest.mark.parametrize("with_statistics", [True, False])
def test_records_of_which_some_have_bytes_are_images(
    tmp_path: Path, with_statistics: bool
) -> None:
    rows = [{"bytes": None, "path": "a.jpg"}, RECORDS[1]]
    path = wrote(tmp_path, {"image": rows}, write_statistics=with_statistics)
    assert given(path) == [("a.jpg", b""), ("2.jpg", b"two")]


@pytest.mark.parametrize(
    "values",
    [
        pa.array(["a.jpg"]),
        pa.array(["a.jpg"], pa.large_string()),
        pa.array(["a.jpg"], pa.string_view()),
        pa.array(["a.jpg"]).dictionary_encode(),
        pa.array([{"path": "a.jpg"}]),
        pa.array([{"id": 1, "path": "a.jpg"}]),
    ],
    ids=[
        "string",
        "large_string",
        "string_view",
        "category",
        "record",
        "record with more",
    ],
)
def test_paths_of_any_type(tmp_path: Path, values: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    assert given(wrote(tmp_path, {"image": values})) == [("a.jpg", b"one")]


@pytest.mark.parametrize("values", [pa.array([7]), pa.array([[1, 2]]), pa.array([1.5])])
def test_a_column_that_holds_no_paths_is_named(tmp_path: Path, values: Any) -> None:
    path = wrote(tmp_path, {"image": values})
    with pytest.raises(
        DataError, match=r"column 'image' holds .*expected a path or URI"
    ):
        given(path)


def test_paths_that_are_not_utf8_stop_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    latin = pa.array([b"a.jpg", b"caf\xe9.jpg"]).view(pa.string())
    found = given(wrote(tmp_path, {"image": latin}))
    assert found == [("a.jpg", b"one"), ("x.parquet row 2", "no path or URL")]
    record = pa.StructArray.from_arrays(
        [pa.array([b"one", b"two"]), latin], ["bytes", "path"]
    )
    found = given(wrote(tmp_path, {"image": record}))
    assert found == [("a.jpg", b"one"), ("x/00000001", b"two")]


def test_files_whose_images_stand_elsewhere(tmp_path: Path, crops: list[bytes]) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    pq.write_table(pa.table({"my.image": [{"bytes": crops[0]}]}), folder / "a.parquet")
    pq.write_table(pa.table({"id": [1], "my.image": [crops[1]]}), folder / "b.PARQUET")
    info = convert(str(folder), str(tmp_path / "dst"), ConvertSettings(), workers=1)
    assert info.num_samples == 2
