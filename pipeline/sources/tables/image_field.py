"""Finds a table's images: columns of bytes, records of (bytes, path), records in records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

IMAGE_COLUMNS = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "photo",
    "bytes",
    "image_bytes",
)
"""Usual names of a column of images, the best first."""


@dataclass(frozen=True)
class ImageField:
    """A column of images, or a field of one that is a record.

    Args:
        names: Names from the column down to the image: one, or more if records are nested. A name
            may hold dots itself, so that a joined path cannot be taken apart again.
        kind: Arrow's type there.
    """

    names: tuple[str, ...]
    kind: Any

    @property
    def name(self) -> str:
        """Return what the user calls it."""
        return ".".join(self.names)

    @property
    def bytes_path(self) -> str:
        """Return the path of the bytes among Parquet's columns; empty if there are none."""
        if is_binary(self.kind):
            return self.name
        inner = _child(self.kind, "bytes")
        return f"{self.name}.bytes" if is_binary(inner) else ""

    @property
    def text_path(self) -> str:
        """Return the path of the images' own paths among Parquet's columns; empty if there are
        none."""
        if is_text(self.kind):
            return self.name
        inner = _child(self.kind, "path")
        return f"{self.name}.path" if is_text(inner) else ""

    def leaf(self, table: Any) -> Any:
        """Return the values of the one leaf of this field that was read into a table or batch."""
        values = table.column(self.names[0])
        # Of each record, only the part that was asked for has been read: its only child.
        while pa.types.is_struct(values.type):
            values = pc.struct_field(values, [0])
        return values


def fields_of(schema: pa.Schema) -> list[ImageField]:
    """Return every column, then the records inside of records that look like images."""
    columns = [ImageField((field.name,), field.type) for field in schema]
    nested = [inner for column in columns for inner in _inside(column)]
    return [*columns, *nested]


def _inside(outer: ImageField) -> Iterator[ImageField]:
    """Yield images in a record's fields, at any depth."""
    # A record of (bytes, path) is an image itself.
    if not pa.types.is_struct(outer.kind) or outer.bytes_path:
        return
    for number in range(outer.kind.num_fields):
        field = outer.kind.field(number)
        inner = ImageField((*outer.names, field.name), field.type)
        # Other bytes, such as an embedding beside an image's URL, are not taken for an image.
        is_named = field.name.lower() in IMAGE_COLUMNS
        if inner.bytes_path and (is_named or pa.types.is_struct(field.type)):
            yield inner
        yield from _inside(inner)


def lists_of_images(schema: pa.Schema) -> list[str]:
    """Return the columns that hold several images, or several paths, in a row."""
    found: list[str] = []
    for field in schema:
        kind: Any = field.type
        is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        # Hugging Face's fixed sequences.
        is_list = is_list or pa.types.is_fixed_size_list(kind)
        if not is_list:
            continue
        inner = ImageField(("item",), kind.value_type)
        singular = field.name.lower().removesuffix("s")
        is_named = singular in IMAGE_COLUMNS
        if inner.bytes_path or (is_named and inner.text_path):
            found.append(field.name)
    return found


def explain_lists(schema: pa.Schema) -> str:
    """Return what to do about columns with several images in a row; empty if there are none."""
    lists = lists_of_images(schema)
    if not lists:
        return ""
    return (
        f" Column {lists[0]!r} holds a list of images in each row, but a sample is one image: "
        f"write one row per image, for example with pandas' DataFrame.explode({lists[0]!r})."
    )


def is_binary(kind: Any) -> bool:
    """Tell whether a type holds bytes of any length."""
    if kind is None:
        return False
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        # A newer layout, which pyarrow restores if a file's schema names it.
        or pa.types.is_binary_view(kind)
    )


def is_text(kind: Any) -> bool:
    """Tell whether a type holds text; categories of text are text."""
    if kind is None:
        return False
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return (
        pa.types.is_string(kind)
        # Polars writes the large type for every text.
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )


def readable_texts(values: Any) -> Any:
    """Return a column of text as strings; null where the text is not UTF-8.

    Parquet does not check what programs write as text: such a value ends in an exception when it
    becomes Python's.
    """
    texts = values.cast(pa.string())
    try:
        texts.validate(full=True)
        return texts
    except pa.ArrowInvalid:
        readable = [_text_or_none(text) for text in texts]
        return pa.chunked_array([pa.array(readable, pa.string())])


def _text_or_none(text: Any) -> str | None:
    try:
        value = text.as_py()
    except UnicodeDecodeError:
        return None
    return None if value is None else str(value)


def _child(kind: Any, name: str) -> Any:
    """Return the type of a record's field; None if there is no such field."""
    if not pa.types.is_struct(kind):
        return None
    number = kind.get_field_index(name)
    return None if number < 0 else kind.field(number).type
