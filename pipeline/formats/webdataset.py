"""WebDataset shards: samples are the adjacent members of a tar that share a key.

The key is the member's path up to the first dot of its base name, as in the webdataset library.
Only members with the extensions in `EXTENSIONS` are read; a pickle is never opened. Whatever makes
other readers lose samples in silence (a cut file, a damaged header, members of a key that are not
adjacent) is an error here.
"""

from __future__ import annotations

import re

from pipeline.formats.records import SUFFIXES

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
"""Extensions of images, best first: if a key has several, the first is the sample's image."""
EXTENSIONS = (*IMAGE_EXTENSIONS, "cls", "json", "txt")
"""Members that may be read; the rest is counted and skipped."""
SUFFIX = SUFFIXES["webdataset"]
# The folder belongs to the key, and dots in it do not count: "a.b/c.seg.png" is "a.b/c", "seg.png".
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
RESERVED_NAME = re.compile(r"^__[^/]*__($|/)")
"""Members such as `__metadata__`, which the webdataset library keeps for itself."""


def split_key(name: str) -> tuple[str, str] | None:
    """Return (key, extension in lower case) of a member's path, or None if it has no
    extension."""
    found = _MEMBER.match(name)
    if found:
        key = found.group(1)
        extension = found.group(2)
        return key, extension.lower()
    return None


def make_dali_index(samples: list[list[tuple[str, int, int, str]]]) -> bytes:
    """Return an index file for DALI's `readers.webdataset`: v1.2, as its tool wds2idx writes.

    Args:
        samples: per sample, the (extension, data offset, size, member name) of its members.
    """
    lines = [f"v1.2 {len(samples)}"]
    for components in samples:
        words = []
        for part, offset, size, name in components:
            # The format splits at blanks and quotes none: DALI would read the wrong bytes.
            is_one_word = name.split() == [name] and part.split() == [part]
            if not is_one_word:
                return b""
            words.append(f"{part} {offset} {size} {name}")
        lines.append(" ".join(words))
    text = "\n".join(lines) + "\n"
    return text.encode()
