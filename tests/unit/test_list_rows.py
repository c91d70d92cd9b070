"""Lists as people have them: delimiters, encodings, blanks, damaged rows, impossible paths."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.images.refused import Refused
from pipeline.sources.choose import open_source
from pipeline.sources.listing import Listing, SourceSettings
from pipeline.sources.table import _why_unread
from pipeline.sources.tables.text_rows import DelimitedTable
from pipeline.storage.retry import explain

NONE = -1


def listed(src: Path | str, **settings: Any) -> Listing:
    return open_source(str(src), SourceSettings(**settings)).listing()


def wrote(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "b.jpg").write_bytes(b"xy")
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def contents(listing: Listing) -> list[tuple[str, int]]:
    return list(zip(listing.names.to_pylist(), listing.labels.tolist(), strict=True))


PLAIN = [("a.jpg", 3), ("b.jpg", 4)]
TEXTS = {
    "plain": "path,label\na.jpg,3\nb.jpg,4\n",
    "blanks after the comma": "path, label\na.jpg, 3\nb.jpg, 4\n",
    "blanks around everything": " path , label \n a.jpg , 3 \n b.jpg ,4\n",
    "blanks before quotes": 'path, label\n"a.jpg", "3"\n"b.jpg" , "4"\n',
    "no end of line": "path,label\na.jpg,3\nb.jpg,4",
    "Windows": "path,label\r\na.jpg,3\r\nb.jpg,4\r\n",
    "old Mac": "path,label\ra.jpg,3\rb.jpg,4\r",
    "byte order mark": "\ufeffpath,label\na.jpg,3\nb.jpg,4\n",
    "byte order mark and quotes": '\ufeff"path","label"\r\n"a.jpg","3"\r\n"b.jpg","4"\r\n',
    "UTF-16": "path,label\na.jpg,3\nb.jpg,4\n".encode("utf-16"),
    "semicolons": "path;label\na.jpg;3\nb.jpg;4\n",
    "tabs": "path\tlabel\na.jpg\t3\nb.jpg\t4\n",
    "bars": "path|label\na.jpg|3\nb.jpg|4\n",
    "Excel's first line": "sep=;\npath;label\na.jpg;3\nb.jpg;4\n",
    "blank lines": "\n\npath,label\n\na.jpg,3\n\n,\nb.jpg,4\n  \n",
    "a delimiter at every end": "path,label,\na.jpg,3,\nb.jpg,4\n",
    "a delimiter behind values": "path,label\na.jpg,3,\nb.jpg,4,,\n",
    "an index without a name": ",path,label\n0,a.jpg,3\n1,b.jpg,4\n",
    "floats": "path,label\na.jpg,3.0\nb.jpg,4.\n",
    "a sign": "path,label\na.jpg,+3\nb.jpg,04\n",
    "upper case": "Path,LABEL\na.jpg,3\nb.jpg,4\n",
    "a comma in a caption": 'path,caption,label\na.jpg,"one, two",3\nb.jpg,"""x"", y",4\n',
    "a line break in a caption": 'path,caption,label\na.jpg,"one\ntwo",3\nb.jpg,z,4\n',
    "commas in semicolon's values": "caption;path;label\nx, y;a.jpg;3\n,;b.jpg;4\n",
}


@pytest.mark.parametrize("ending", ["csv", "tsv", "CSV", "Tsv"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_list_in_any_dialect(tmp_path: Path, text: str | bytes, ending: str) -> None:
    listing = listed(wrote(tmp_path, f"list.{ending}", text))
    assert contents(listing) == PLAIN
    assert listing.sizes.tolist() == [1, 2]
    assert listing.classes is None
    assert listing.locations is None


LABELS = {
    "empty": ("dog,,cat", [1, NONE, 0], ["cat", "dog"]),
    "blank": ('dog,"  ",cat', [1, NONE, 0], ["cat", "dog"]),
    "blanks around": ("dog, dog,cat ", [1, 1, 0], ["cat", "dog"]),
    "NaN": ("dog,NaN,cat", [1, NONE, 0], ["cat", "dog"]),
    "nan": ("1,nan,2", [1, NONE, 2], None),
    "NA": ("dog,NA,null", [0, NONE, NONE], ["dog"]),
    "None": ("3,None,NULL", [3, NONE, NONE], None),
    "empty among numbers": ("1,,2", [1, NONE, 2], None),
    "floats and empty": ("1.0,,2.0", [1, NONE, 2], None),
    "truth": ("True,False,true", [1, 0, 1], None),
    "a date": ("2020-01-02,2020-01-01,x", [1, 0, 2], ["2020-01-01", "2020-01-02", "x"]),
    "numbers and a name": ("10,9,x", [0, 1, 2], ["10", "9", "x"]),
    "minus one": ("-1,0,1", [NONE, 0, 1], None),
    "all empty": (",,", [NONE] * 3, None),
}


@pytest.mark.parametrize(("given_", "labels", "classes"), LABELS.values(), ids=LABELS)
def test_labels_of_text(
    tmp_path: Path, given_: str, labels: list[int], classes: list[str] | None
) -> None:
    rows = [f"{row}.jpg,{label}" for row, label in enumerate(given_.split(","))]
    listing = listed(wrote(tmp_path, "list.csv", "\n".join(["path,label", *rows])))
    assert listing.labels.tolist() == labels
    assert listing.classes == classes


@pytest.mark.parametrize(
    "number", ["2147483648", "-2", "99999999999999999999", "1.5", "1e12"]
)
def test_text_that_is_no_class_number(tmp_path: Path, number: str) -> None:
    path = wrote(tmp_path, "list.csv", f"path,label\na.jpg,1\nb.jpg,{number}\n")
    with pytest.raises(
        DataError, match=r"'label' of .*list\.csv: the label .* of image 2"
    ):
        listed(path)


def test_an_unknown_label_column_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wrote(tmp_path, "list.csv", "path, species,count\na.jpg,dog,1\n")
    assert listed(path).labels.tolist() == [NONE]
    said = capsys.readouterr().err
    assert "no label column was found" in said
    assert "there are path, species, count" in said
    assert listed(path, label_column="species").classes == ["dog"]
    with pytest.raises(
        ConfigError, match=r"no column 'kind' .*it has path, species, count"
    ):
        listed(path, label_column="kind")


@pytest.mark.parametrize(
    "text",
    ["a.jpg,3\nb.jpg,4\n", "a.jpg\nb.jpg\n", "\n", "", "x;y\n1;2\n"],
    ids=["rows", "paths", "blank", "empty", "other columns"],
)
def test_a_header_that_is_missing_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no column of URIs.*header, for example.*path,label"
    ):
        listed(wrote(tmp_path, "list.csv", text))


@pytest.mark.parametrize(
    "text", ["my path;label\na.jpg;3\n", "my path,label\na.jpg,3\n"]
)
def test_the_columns_of_an_unknown_header_are_listed(tmp_path: Path, text: str) -> None:
    path = wrote(tmp_path, "list.csv", text)
    with pytest.raises(ConfigError, match="it has my path, label"):
        listed(path)
    with pytest.raises(ConfigError, match=r"no column 'x' .*it has my path, label"):
        listed(path, image_column="x")
    assert contents(listed(path, image_column="my path")) == [("a.jpg", 3)]


@pytest.mark.parametrize("text", ["[", "7", '{"a": 1}}', "[" * 100_000])
def test_json_lines_without_an_object_say_why(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        DataError, match=r"metadata\.jsonl line 1: is not a JSON object"
    ):
        listed(wrote(tmp_path, "metadata.jsonl", text))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = wrote(tmp_path, "list.csv", "path,label,label\na.jpg,1,2\n")
    with pytest.raises(ConfigError, match="2 columns called 'label'"):
        listed(path)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_another_encoding_is_named_with_its_line(tmp_path: Path, encoding: str) -> None:
    text = "path,label\na.jpg,dog\nb.jpg,caf\u00e9\n".encode(encoding)
    with pytest.raises(
        DataError, match=r"list\.csv, line 3: byte 0xe9 is not utf-8.*iconv -f"
    ):
        listed(wrote(tmp_path, "list.csv", text))


def test_names_in_any_script_are_kept(tmp_path: Path) -> None:
    (tmp_path / "\u732b.jpg").write_bytes(b"x")
    listing = listed(wrote(tmp_path, "list.csv", "path,label\n\u732b.jpg,caf\u00e9\n"))
    assert contents(listing) == [("\u732b.jpg", 0)]
    assert listing.classes == ["caf\u00e9"]
    assert listing.sizes.tolist() == [1]


@pytest.mark.parametrize("folder", ["data[1]", "[a-z]", "a{b,c}"])
@pytest.mark.parametrize(
    "name", ["list[1].csv", "x.CSV", "x[0-9].parquet", "X.PARQUET"]
)
def test_brackets_and_upper_case_in_paths(
    tmp_path: Path, folder: str, name: str
) -> None:
    root = tmp_path / folder
    root.mkdir()
    (root / "images").mkdir()
    (root / "images" / "a.jpg").write_bytes(b"x")
    if name.lower().endswith("parquet"):
        pq.write_table(pa.table({"path": ["images/a.jpg"], "label": [3]}), root / name)
        assert listed(root).sizes.tolist() == [1]
    else:
        (root / name).write_text("path,label\nimages/a.jpg,3\n")
    assert contents(listed(root / name)) == [("images/a.jpg", 3)]


# --------------------------------------------------------------------------------- damaged rows

LONG = "x" * 300 + ".jpg"
ROWS = {
    "too few values": ("a", "list.csv line 3", "row cannot be read"),
    "too many values": ("a,1,2", "list.csv line 3", "row cannot be read"),
    "an open quote": ('"a.jpg,1', "list.csv line 3", "row cannot be read"),
    "a quote inside": ('x,"1"2"', "list.csv line 3", "row cannot be read"),
    "no path": (",1", "list.csv line 3", "no path or URL"),
    "a blank path": ('" ",1', "list.csv line 3", "no path or URL"),
    "a NUL byte": ("a\0.jpg,1", "a\0.jpg", "not a valid path or URL"),
    "another scheme": (
        "ftp://host/a.jpg,1",
        "ftp://host/a.jpg",
        "not a valid path or URL",
    ),
    "a command": ("pipe:touch x,1", "pipe:touch x", "not a valid path or URL"),
    "a name that is too long": (f"{LONG},1", LONG, "not a valid path or URL"),
    "a folder": ("sub,1", "sub", "not a file"),
    "a device": ("/dev/zero,1", "/dev/zero", "not a file"),
    "a pipe": ("fifo,1", "fifo", "not a file"),
    "a link to itself": ("loop,1", "loop", "not a valid path or URL"),
    "a missing file": ("gone.jpg,1", "gone.jpg", "not found"),
    "a file taken for a folder": ("a.jpg/b.jpg,1", "a.jpg/b.jpg", "not found"),
}


def refused(src: Path) -> list[tuple[str, str]]:
    """Give name and reason of each image that a source does not give, as a worker sees it."""
    source = open_source(str(src))
    listing = source.listing()
    wanted = listing.wanted(pa.array(range(len(listing))).to_numpy())
    given_ = zip(wanted.names, source.read_all(wanted), strict=True)
    return [
        (name, str(data.reason)) for name, data in given_ if isinstance(data, Refused)
    ]


@pytest.mark.parametrize(("row", "name", "reason"), ROWS.values(), ids=ROWS)
def test_one_bad_row_stops_no_other(
    tmp_path: Path, row: str, name: str, reason: str
) -> None:
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    path = wrote(tmp_path, "list.csv", f"path,label\na.jpg,3\n{row}\nb.jpg,4\n")
    assert refused(path) == [(name, reason)]
    listing = listed(path)
    assert [pair for pair in contents(listing) if pair[0] != name] == PLAIN
    assert len(listing) == 3


def test_bad_rows_are_counted_and_listed(
    tmp_path: Path, crops: list[bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(crops[number])
    rows = ["0.jpg,dog", *(row for row, _, _ in ROWS.values()), "1.jpg,cat", "2.jpg,"]
    text = "\n".join(["path,label", *rows])
    info = convert(
        str(wrote(tmp_path, "list.csv", text)),
        str(tmp_path / "dst"),
        ConvertSettings(),
        workers=1,
    )
    said = capsys.readouterr().err
    assert (
        "rows cannot be used, for example: list.csv line 3: 1 values, the header has 2"
        in said
    )
    rejected = pq.read_table(tmp_path / "dst" / "rejected.parquet").to_pylist()
    assert info.num_samples == 3
    assert info.num_samples + len(rejected) == len(rows)
    # Without the links and folders of the other test, some names are merely not there.
    assert Counter(row["reason"] for row in rejected)["row cannot be read"] == 4
    dataset = open_dataset(str(tmp_path / "dst"))
    ids = np.arange(3)
    labels = dataset.lookup(ids).labels_B.tolist()
    found = dict(zip(dataset.keys(ids), labels, strict=True))
    classes = {
        key: info.classes[label]
        for key, label in found.items()
        if info.classes and label >= 0
    }
    assert classes == {"0": "dog", "1": "cat"}
    assert found["2"] == NONE


def test_a_bad_row_changes_no_key(tmp_path: Path) -> None:
    good = "path\nimgs/x/a.jpg\nimgs/y/b.jpg\n"
    keys = listed(wrote(tmp_path, "list.csv", good)).keys
    assert keys is not None
    with_bad = listed(wrote(tmp_path, "list.csv", f"{good}z,1\nftp://h/c.jpg\n")).keys
    assert with_bad is not None
    assert with_bad.to_pylist()[:2] == keys.to_pylist() == ["x/a", "y/b"]


def test_strict_stops_at_a_bad_row(tmp_path: Path, crops: list[bytes]) -> None:
    path = wrote(tmp_path, "list.csv", "path,label\na.jpg,1\na.jpg\n")
    (tmp_path / "a.jpg").write_bytes(crops[0])
    with pytest.raises(DataError, match=r"list\.csv line 3: row cannot be read"):
        convert(
            str(path), str(tmp_path / "dst"), ConvertSettings(strict=True), workers=1
        )


def test_a_list_of_bad_rows_alone_says_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'ftp://', which is not opened"):
        listed(wrote(tmp_path, "list.csv", "url\nftp://host/a.jpg\nftp://host/b.jpg\n"))
    with pytest.raises(
        DataError, match=r"list\.csv line 2: 3 values, the header has 2"
    ):
        listed(wrote(tmp_path, "list.csv", "url,label\na.jpg,1,2\n"))


class AnswerError(Exception):
    """What a web server's refusal becomes in the storage's file system."""

    def __init__(self, status: int) -> None:
        super().__init__(str(status))
        self.status = status


@pytest.mark.parametrize(
    ("name", "cause", "reason"),
    [
        ("https://h/a.jpg", AnswerError(404), "not found"),
        ("https://h/a.jpg", AnswerError(410), "not found"),
        ("https://h/a.jpg", AnswerError(403), "no permission to read"),
        ("https://h/a.jpg", AnswerError(401), "no permission to read"),
        ("https://h/a.jpg", AnswerError(500), None),
        ("gs://b/a.jpg", AnswerError(403), None),
        ("a.jpg", PermissionError(13, "no", "a.jpg"), "no permission to read"),
        ("s3://b/a.jpg", PermissionError("Access Denied"), None),
        ("a.jpg", OSError(5, "input/output error"), None),
    ],
)
def test_what_is_wrong_with_one_image_alone(
    name: str, cause: Exception, reason: Any
) -> None:
    error = explain("read", name, cause)
    error.__cause__ = cause
    assert _why_unread(error, name) == reason


def test_a_parquet_list_with_bad_rows(tmp_path: Path) -> None:
    wrote(tmp_path, "x", b"")
    names = ["a.jpg", None, "", "ftp://h/a.jpg", "b.jpg", "a\0"]
    table = pa.table(
        {"path": names, "label": [3, 0, 0, 0, 4, 0], "size": [1, 2, 3, 4, 5, 6]}
    )
    pq.write_table(table, tmp_path / "l.parquet")
    assert refused(tmp_path / "l.parquet") == [
        ("l.parquet row 2", "no path or URL"),
        ("l.parquet row 3", "no path or URL"),
        ("ftp://h/a.jpg", "not a valid path or URL"),
        ("a\0", "not a valid path or URL"),
    ]
    listing = listed(tmp_path / "l.parquet")
    assert contents(listing)[:2] == PLAIN
    assert listing.sizes.tolist() == [1, 5, 0, 0, 0, 0]


cells = st.text(
    st.characters(exclude_characters="\0\r", codec="utf-8"), min_size=1, max_size=6
)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=6), st.sampled_from(",;\t|")
)
def test_what_csv_writes_is_read(rows: list[tuple[str, str]], delimiter: str) -> None:
    def quoted(cell: str) -> str:
        doubled = cell.replace('"', '""')
        return f'"{doubled}"'

    lines = [delimiter.join(map(quoted, row)) for row in [("path", "label"), *rows]]
    table = DelimitedTable(
        "\n".join(lines), delimiter=",", is_header=lambda columns: "path" in columns
    )
    expected = [list(row) for row in rows if any(cell.strip() for cell in row)]
    assert [row.values for row in table.rows()] == expected


def test_a_quotation_mark_that_another_row_closes_swallows_none_between() -> None:
    text = 'path,label\n"a.jpg,1\nhere.jpg,7\nb".jpg,2,3\nc.jpg,4\n'
    table = DelimitedTable(text, delimiter=",", is_header=lambda columns: True)
    found = [row.values for row in table.rows()]
    assert found == [None, ["here.jpg", "7"], None, ["c.jpg", "4"]]
    text = 'path,label\n"a.jpg\nhere.jpg,7\n",2,3\n'
    table = DelimitedTable(text, delimiter=",", is_header=lambda columns: True)
    assert ["here.jpg", "7"] in [row.values for row in table.rows()]


damage = st.lists(st.text(st.sampled_from("ab, "), max_size=8), max_size=6)


@given(damage, st.sampled_from(["", '"', 'a,"b', '"a,b', 'a","b']), damage)
def test_an_open_quotation_mark_swallows_no_row(
    before: list[str], opened: str, after: list[str]
) -> None:
    text = "\n".join(["path,label", *before, opened, "here.jpg,7", *after])
    table = DelimitedTable(text, delimiter=",", is_header=lambda columns: True)
    assert ["here.jpg", "7"] in [row.values for row in table.rows()]


# --------------------------------------------------------------------------------- JSON lines

JSON_LABELS: list[tuple[str, list[Any], list[int], list[str] | None]] = [
    ("numbers", [2, 0], [2, 0], None),
    ("text that is numbers", ["4", "10"], [4, 10], None),
    ("floats", [2.0, 3.0], [2, 3], None),
    ("all of them", ["4", 2.0, 3, True, None], [4, 2, 3, 1, NONE], None),
    ("names", ["dog", "cat", None, "", " "], [1, 0, NONE, NONE, NONE], ["cat", "dog"]),
    ("truth", [True, False], [1, 0], None),
    ("NaN", [float("nan"), 1], [NONE, 1], None),
    ("a float as text", ["2.0", "1"], [2, 1], None),
]


@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "ndjson"])
@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [row[1:] for row in JSON_LABELS],
    ids=[r[0] for r in JSON_LABELS],
)
def test_labels_of_json_lines(
    tmp_path: Path, ending: str, values: list[Any], labels: list[int], classes: Any
) -> None:
    rows = [
        json.dumps({"file_name": f"{n}.jpg", "label": v}) for n, v in enumerate(values)
    ]
    listing = listed(wrote(tmp_path, f"metadata.{ending}", "\n\n".join(rows)))
    assert listing.labels.tolist() == labels
    assert listing.classes == classes


@pytest.mark.parametrize(
    "values",
    [[1, "dog"], ["dog", True], [1.5], [[1, 2]], [{"id": 1}], [10**30], [float("inf")]],
)
def test_json_that_holds_no_label_is_named(tmp_path: Path, values: list[Any]) -> None:
    rows = [
        json.dumps({"file_name": f"{n}.jpg", "label": v}) for n, v in enumerate(values)
    ]
    with pytest.raises((DataError, ConfigError), match=r"'label' of .*metadata\.jsonl"):
        listed(wrote(tmp_path, "metadata.jsonl", "\n".join(rows)))


def test_bad_json_lines_stop_no_other(tmp_path: Path) -> None:
    lines = [
        '{"file_name": "a.jpg", "label": 3}',
        "{",
        "[1]",
        "7",
        '{"file_name": "\\ud800.jpg"}',
    ]
    lines += ['{"label": 1}', '{"file_name": 5}', '{"file_name": "b.jpg", "label": 4}']
    path = wrote(tmp_path, "metadata.jsonl", "\r\n".join(lines))
    assert contents(listed(path))[:2] == PLAIN
    reasons = Counter(reason for _, reason in refused(path))
    assert reasons == {"row cannot be read": 5, "no path or URL": 1}


# ------------------------------------------------------------------- Hugging Face's metadata files

METADATA = {
    "metadata.csv": b"file_name,label\na.jpg,3\nb.jpg,4\n",
    "metadata.jsonl": b'{"file_name": "a.jpg", "label": 3}\n{"file_name": "b.jpg", "label": 4}\n',
}


@pytest.mark.parametrize("name", METADATA)
def test_a_metadata_file_beside_images_is_named_and_read(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = wrote(tmp_path, name, METADATA[name])
    assert listed(tmp_path).labels.tolist() == [NONE, NONE]
    said = capsys.readouterr().err
    assert f"{path} lies beside the images and is not read" in said
    assert contents(listed(path)) == PLAIN
    listed(tmp_path, labels="none")
    assert capsys.readouterr().err == ""


def test_a_metadata_table_beside_images_is_asked_for(tmp_path: Path) -> None:
    wrote(tmp_path, "x", b"")
    table = pa.table({"file_name": ["a.jpg", "b.jpg"], "label": [3, 4]})
    pq.write_table(table, tmp_path / "metadata.parquet")
    with pytest.raises(ConfigError, match="holds images and Parquet files"):
        listed(tmp_path)
    assert contents(listed(tmp_path / "metadata.parquet")) == PLAIN
