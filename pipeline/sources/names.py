"""What a file's name decides: whether it is listed as an image, and its sample's key."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.images.header import IMAGE_SUFFIXES

_EXTENSION = r"\.[^./]*$"
_UNFIT = r"[.\s\p{Z}\p{C}]"
"""Characters that no key of a WebDataset may have: dots, and all kinds of blanks."""


def why_skipped(name: str) -> str | None:
    """Return why a file is not listed as an image; None if it is.

    The one decision by name for folders and tars. The answer is a short text to count by: a file's
    ending, such as `.txt`, or a reason, such as `hidden`.

    Args:
        name: Path below the source, with `/`.
    """
    # macOS writes __MACOSX folders and ._files into archives; their names end like images.
    if storage.is_hidden(name):
        return "hidden"
    suffix = PurePosixPath(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        if suffix != suffix.rstrip() or name != name.rstrip():
            return "blank at the end of the name"
        # An ending is a count's name: what may be a byte that is not UTF-8 must not stand there.
        return suffix if suffix and suffix.isprintable() else "no extension"
    if not _is_utf8(name):  # neither Arrow nor a manifest can hold it
        return "name is not UTF-8"
    return None


def sample_keys(names: pa.StringArray) -> pa.StringArray:
    """Return a unique key per file name: the path without its extension, with underscores for dots
    and blanks.

    If several files would get the same key, their extensions are appended, then their positions in
    the list: `a.b.jpg` and `a_b.jpg` become `a_b-jpg-0` and `a_b-jpg-1`, two times `000000` become
    `000000-0` and `000000-1`. The result depends on the list alone.
    """
    keys = pc.replace_substring_regex(
        names,
        _EXTENSION,
        "",
    )
    keys = pc.replace_substring_regex(
        keys,
        _UNFIT,
        "_",
    )
    # WebDataset keeps names like __key__ for itself.
    keys = pc.replace_substring_regex(
        keys,
        r"^__+",
        "_",
    )
    # An extension or a dot at the start leaves a last part that is empty: that is no name.
    keys = pc.replace_substring_regex(
        keys,
        r"(^|/)$",
        r"\1_",
    )

    # A name without an extension has none to append: its text is in the key already.
    has_extension = pc.match_substring_regex(names, _EXTENSION)
    endings = pc.utf8_lower(
        pc.replace_substring_regex(
            names,
            r"(?s)^.*\.",
            "-",
        )
    )
    endings = pc.replace_substring_regex(
        endings,
        _UNFIT,
        "_",
    )
    suffixes = pc.if_else(
        has_extension,
        endings,
        pa.scalar(""),
    )
    positions = pa.array([f"-{position}" for position in range(len(names))])
    for ending in (suffixes, positions):
        repeated = _repeated(keys)
        if not repeated.any():
            return keys
        keys = _append(
            keys,
            ending,
            to=repeated,
        )

    # A longer key may now equal another file's own: `a-1` made of `a`, beside a file named `a-1`.
    while (repeated := _repeated(keys)).any():
        keys = _append(
            keys,
            pa.scalar("-"),
            to=repeated,
        )
    return keys


def pick(texts: pa.StringArray, rows: npt.NDArray[np.int64]) -> list[str]:
    """Return the texts of some rows, in the order asked for."""
    chosen = texts.take(pa.array(rows, pa.int64()))
    return [str(text) for text in chosen.to_pylist()]


def _append(
    keys: pa.StringArray,
    ending: Any,
    *,
    to: npt.NDArray[np.bool_],
) -> pa.StringArray:
    join: Any = pc.binary_join_element_wise  # its stubs know arrays only
    longer = join(
        keys,
        ending,
        pa.scalar(""),
    )
    return pc.if_else(
        pa.array(to),
        longer,
        keys,
    )


def _repeated(keys: pa.StringArray) -> npt.NDArray[np.bool_]:
    """Return which keys another file has too."""
    encoded = keys.dictionary_encode()
    codes = encoded.indices.to_numpy()
    counts = np.bincount(codes, minlength=len(encoded.dictionary))
    return counts[codes] > 1


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a surrogate, which stands for a byte that is not UTF-8
        return False
    return True
