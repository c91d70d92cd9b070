"""What is a label in a column of a table: every type that holds numbers or names, several files
that differ, and values that cannot be one."""

from __future__ import annotations

import decimal
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ConfigError, DataError
from pipeline.formats.webdataset_index import index_shard
from pipeline.sources.choose import open_source
from pipeline.sources.listing import Listing, SourceSettings

NONE = -1


def write(
    folder: Path, files: dict[str, Any], *, column: str = "label", kind: str
) -> str:
    """Write tables of images (`parquet`) or of their URIs (`list`), one file per label column."""
    for name, labels in files.items():
        count = 3 if labels is None else len(labels)
        columns: dict[str, Any] = {
            "image": pa.array([b"x"] * count, pa.binary())
            if kind == "parquet"
            else [f"https://host/{name}/{row}.jpg" for row in range(count)]
        }
        if labels is not None:
            columns[column] = labels
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder)


def listed(src: str, **settings: Any) -> Listing:
    return open_source(src, SourceSettings(**settings)).listing()


def category(values: list[Any], categories: list[Any]) -> pa.Array:
    """Give what pyarrow makes of a pandas column of dtype `category`."""
    places = [None if value is None else categories.index(value) for value in values]
    return pa.DictionaryArray.from_arrays(
        pa.array(places, pa.int8()), pa.array(categories)
    )


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
NUMBERS = [
    *[(name, pa.array([0, 7, None], getattr(pa, name)())) for name in INTEGERS],
    ("bool", pa.array([False, True, None])),
    ("float16", pa.array([0.0, 7.0, None], pa.float16())),
    ("float32", pa.array([0.0, 7.0, float("nan")], pa.float32())),
    ("float64", pa.array([0.0, 7.0, float("nan")])),
    (
        "decimal",
        pa.array([decimal.Decimal(0), decimal.Decimal(7), None], pa.decimal128(9, 2)),
    ),
    ("decimal256", pa.array([decimal.Decimal(0), 7, None], pa.decimal256(40, 0))),
    ("category", category([0, 7, None], [7, 9, 0])),
    ("category of floats", category([0.0, 7.0, None], [7.0, 0.0])),
]
KINDS = ["parquet", "list"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "values"), NUMBERS, ids=[name for name, _ in NUMBERS])
def test_numbers_of_any_type(
    tmp_path: Path, kind: str, name: str, values: pa.Array
) -> None:
    listing = listed(write(tmp_path, {"a": values}, kind=kind))
    assert listing.labels.tolist() == [0, 1 if name == "bool" else 7, NONE]
    assert listing.classes is None


TEXTS = ["dog", None, "cat", "", "  ", "dog"]
NAMES = [
    ("string", pa.array(TEXTS)),
    ("large_string", pa.array(TEXTS, pa.large_string())),
    ("string_view", pa.array(TEXTS, pa.string_view())),
    ("category", category(TEXTS, ["dog", "cat", "", "  "])),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "values", [v for _, v in NAMES], ids=[name for name, _ in NAMES]
)
def test_names_of_any_type(tmp_path: Path, kind: str, values: pa.Array) -> None:
    listing = listed(write(tmp_path, {"a": values}, kind=kind))
    assert listing.labels.tolist() == [1, NONE, 0, NONE, NONE, 1]
    assert listing.classes == ["cat", "dog"]


def test_categories_without_an_image_keep_their_numbers(tmp_path: Path) -> None:
    known = ["bee", "ant", "cat"]
    listing = listed(
        write(tmp_path, {"a": category(["cat", "ant"], known)}, kind="parquet")
    )
    assert listing.classes == ["ant", "bee", "cat"]
    assert listing.labels.tolist() == [2, 0]


FILES: list[tuple[str, dict[str, Any], list[int], list[str] | None]] = [
    (
        "int32 beside int64",
        {"a": pa.array([0, 1], pa.int32()), "b": pa.array([2, 3], pa.int64())},
        [0, 1, 2, 3],
        None,
    ),
    (
        "unsigned, float and bool",
        {"a": pa.array([5], pa.uint64()), "b": pa.array([4.0]), "c": pa.array([True])},
        [5, 4, 1],
        None,
    ),
    (
        "a file of nulls",
        {"a": pa.nulls(2), "b": pa.array([3])},
        [NONE, NONE, 3],
        None,
    ),
    (
        "a file of nulls with a type",
        {"a": pa.array([None, None], pa.string()), "b": pa.array([3])},
        [NONE, NONE, 3],
        None,
    ),
    (
        "a file without the column",
        {"a": None, "b": pa.array([3])},
        [NONE] * 3 + [3],
        None,
    ),
    (
        "names beside nulls and beside no column",
        {
            "a": pa.array(["b"]),
            "b": pa.nulls(1),
            "c": None,
            "d": pa.array(["a"], pa.large_string()),
        },
        [1, *[NONE] * 4, 0],
        ["a", "b"],
    ),
    (
        "a category beside text",
        {"a": category(["b"], ["b", "c"]), "b": pa.array(["a"])},
        [1, 0],
        ["a", "b", "c"],
    ),
    (
        "no row in one file",
        {"a": pa.array([], pa.int64()), "b": pa.array([3])},
        [3],
        None,
    ),
    ("no label at all", {"a": pa.nulls(1), "b": None}, [NONE] * 4, None),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("files", "labels", "classes"),
    [row[1:] for row in FILES],
    ids=[row[0] for row in FILES],
)
def test_files_that_differ_harmlessly(
    tmp_path: Path, kind: str, files: dict[str, Any], labels: list[int], classes: Any
) -> None:
    listing = listed(write(tmp_path, files, kind=kind))
    assert listing.labels.tolist() == labels
    assert listing.classes == classes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names",
    [pa.array(["dog"]), pa.array(["7"]), category(["dog"], ["dog"])],
    ids=["text", "digits", "category"],
)
def test_numbers_beside_names_are_refused(
    tmp_path: Path, kind: str, names: Any
) -> None:
    src = write(tmp_path, {"a": pa.array([1]), "b": names}, kind=kind)
    with pytest.raises(
        DataError, match=r"a\.parquet holds numbers.*b\.parquet holds names"
    ):
        listed(src)
    assert listed(src, labels="none").labels.tolist() == [NONE, NONE]


WRONG = [
    ("beyond int32", pa.array([0, 2**31]), "2147483648 of image 2 is out of range"),
    (
        "beyond int64",
        pa.array([2**64 - 1], pa.uint64()),
        "18446744073709551615 of image 1",
    ),
    ("below -1", pa.array([3, -2, -100]), "-2 of image 2 and 1 others is out of range"),
    ("a fraction", pa.array([1.0, 2.5]), "2.5 of image 2 is not a whole number"),
    (
        "a decimal fraction",
        pa.array([decimal.Decimal("1.25")]),
        "1.25 of image 1 is not a whole",
    ),
    ("infinite", pa.array([float("inf")]), "inf of image 1 is out of range"),
    ("a large float", pa.array([1e300]), "of image 1 is out of range"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("values", "said"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_values_that_are_no_label_are_named(
    tmp_path: Path, kind: str, values: pa.Array, said: str
) -> None:
    src = write(tmp_path, {"a": values}, kind=kind)
    with pytest.raises(DataError, match=said) as caught:
        listed(src)
    assert "a.parquet" in str(caught.value)
    assert "'label'" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1, 2]]),
        pa.array([{"id": 1}]),
        pa.array([b"dog"]),
        pa.array([1], pa.timestamp("s")),
    ],
    ids=["list", "record", "bytes", "time"],
)
def test_types_that_hold_no_label_are_named(
    tmp_path: Path, kind: str, values: Any
) -> None:
    src = write(tmp_path, {"a": values}, kind=kind)
    with pytest.raises(
        ConfigError, match=r"'label' of .*a\.parquet holds .*expected whole"
    ):
        listed(src)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_category", [False, True])
def test_names_that_are_not_utf8_are_told(
    tmp_path: Path, kind: str, is_category: bool
) -> None:
    latin = pa.array([b"dog", b"caf\xe9"]).view(pa.string())
    values = latin.dictionary_encode() if is_category else latin
    src = write(tmp_path, {"a": values}, kind=kind)
    with pytest.raises(
        DataError, match=r"'label' of .*a\.parquet: 1 labels are not UTF-8"
    ):
        listed(src)
    assert listed(src, labels="none").labels.tolist() == [NONE, NONE]


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    src = write(
        tmp_path,
        {"a": pa.array([-1, 4], pa.int8()), "b": pa.array([-1.0])},
        kind="list",
    )
    assert listed(src).labels.tolist() == [NONE, 4, NONE]


# ------------------------------------------------------------------------------------ names of them


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_is_not_found_is_said(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"a": pa.array([1]), "b": pa.array([2])}
    src = write(tmp_path, files, column="species", kind=kind)
    assert listed(src).labels.tolist() == [NONE, NONE]
    said = capsys.readouterr().err
    assert "no label column was found" in said
    assert "there are image, species" in said
    assert "--label-column" in said
    assert listed(src, label_column="species").labels.tolist() == [1, 2]
    assert listed(src, labels="none").labels.tolist() == [NONE, NONE]
    assert capsys.readouterr().err == ""
    with pytest.raises(
        ConfigError, match=r"no column 'kind' \(--label-column\).*image, species"
    ):
        listed(src, label_column="kind")


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_other_sources_are_said(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write(tmp_path, {"a": pa.array([1])}, kind=kind)
    assert listed(src, labels="folders", ground_truth="x.txt").labels.tolist() == [1]
    assert "--labels folders, --ground-truth is not used" in capsys.readouterr().err
    assert listed(src).labels.tolist() == [1]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", KINDS)
def test_files_without_labels_are_said(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    src = write(tmp_path, {"a": pa.array([1, None, -1]), "b": None}, kind=kind)
    assert listed(src, label_column="label").labels.tolist() == [1, *[NONE] * 5]
    said = capsys.readouterr().err
    assert "1 of 2 files have no label column" in said
    assert "b.parquet" in said
    assert "5 of 6 images have no label" in said


def class_labels(
    folder: Path, name: str, names: list[str] | None, labels: list[int]
) -> None:
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    head = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    table = pa.table({"image": [b"x"] * len(labels), "label": labels})
    pq.write_table(
        table.replace_schema_metadata(head if names else None), folder / name
    )


@pytest.mark.parametrize(
    ("first", "second", "classes"),
    [
        (["a", "b"], ["a", "b"], ["a", "b"]),
        (["a", "b"], ["a", "b", "c"], ["a", "b", "c"]),
        (["a", "b"], None, ["a", "b"]),
        (None, ["b", "a"], ["b", "a"]),
        (["a", "b"], ["b", "a"], "label 0 is 'b' in"),
        (["a", "b"], ["a", "c", "b"], "label 1 is"),
    ],
)
def test_class_names_of_several_files(
    tmp_path: Path, first: Any, second: Any, classes: list[str] | str
) -> None:
    class_labels(tmp_path, "x.parquet", first, [0, 1])
    class_labels(tmp_path, "y.parquet", second, [1, 0])
    if isinstance(classes, list):
        assert listed(str(tmp_path)).classes == classes
        return
    with pytest.raises(DataError, match=classes) as caught:
        listed(str(tmp_path))
    assert "x.parquet" in str(caught.value)
    assert "y.parquet" in str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    columns = [pa.array([b"x"]), pa.array([1]), pa.array([2]), pa.array([3])]
    table = pa.Table.from_arrays(columns, ["image", "label", "label", "more"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="2 columns called 'label'"):
        listed(str(tmp_path))
    assert listed(str(tmp_path), label_column="more").labels.tolist() == [3]


# ------------------------------------------------------------------------------- samples of a tar

SAMPLES: list[tuple[str, str, int, bool]] = [
    ("cls", "4", 4, True),
    ("cls", " 4\n", 4, True),
    ("cls", "4.0", 4, True),
    ("cls", "-1", NONE, True),
    ("cls", "", NONE, True),
    ("cls", "nan", NONE, True),
    ("cls", "dog", NONE, False),
    ("cls", "4.5", NONE, False),
    ("cls", "-2", NONE, False),
    ("cls", "2147483648", NONE, False),
    ("cls", "9" * 5000, NONE, False),
    ("json", '{"label": 4}', 4, True),
    ("json", '{"label": "4"}', 4, True),
    ("json", '{"label": " 4 "}', 4, True),
    ("json", '{"label": 2.0}', 2, True),
    ("json", '{"label": "2.0"}', 2, True),
    ("json", '{"label": true}', 1, True),
    ("json", '{"label": null}', NONE, True),
    ("json", '{"label": ""}', NONE, True),
    ("json", '{"label": NaN}', NONE, True),
    ("json", '{"label": -1}', NONE, True),
    ("json", '{"caption": "4"}', NONE, True),
    ("json", "[4]", NONE, True),
    ("json", "{", NONE, True),
    ("json", '{"label": "dog"}', NONE, False),
    ("json", '{"label": 2.5}', NONE, False),
    ("json", '{"label": Infinity}', NONE, False),
    ("json", '{"label": [4]}', NONE, False),
    ("json", '{"label": 1000000000000}', NONE, False),
]


def test_labels_of_a_tars_samples(tmp_path: Path, crops: list[bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number, (ending, text, _, _) in enumerate(SAMPLES):
            for name, data in (("jpg", crops[0]), (ending, text.encode())):
                member = tarfile.TarInfo(f"{number:03}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    index = index_shard(str(tmp_path / "a.tar"))
    found = dict(
        zip([row[:2] for row in SAMPLES], index.table.labels.tolist(), strict=True)
    )
    assert found == {row[:2]: row[2] for row in SAMPLES}
    # Those that are lost are counted.
    num_strange = sum(not fine for *_, fine in SAMPLES)
    assert index.ignored["labels that are no class number"] == num_strange
    # JSON without keys has no label at all, and is counted for itself.
    assert (
        index.ignored["JSON that is not an object"]
        == sum(index.ignored.values()) - num_strange
    )


@given(
    st.lists(st.one_of(st.none(), st.integers(-1, 2**31 - 1)), min_size=1, max_size=9),
    st.sampled_from(["int64", "float64", "category"]),
)
def test_any_numbers_are_kept(
    tmp_path_factory: pytest.TempPathFactory, values: list[int | None], how: str
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    array = pa.array(values, pa.float64() if how == "float64" else pa.int64())
    labels = array.dictionary_encode() if how == "category" else array
    found = listed(write(folder, {"a": labels}, kind="parquet")).labels
    assert found.tolist() == [NONE if value is None else value for value in values]
