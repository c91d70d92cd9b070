"""The house keeps its style: one idea a line, comments that say why, plain words, short functions.

`python tests/measure_style.py` prints the figures by folder and file.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER_FILES = 12
WHERE_PER_MILLE = 1.5
"""Occurrences of "where" in a thousand words; "if" and "when" are other words."""

# Lower a limit whenever a change allows it, e.g. that of functions towards 64; never raise one.
FUNCTION_LINES = 74
NODES_PER_LINE = 8.5
COMMENT_SHARE = 0.04

# tests/ is not a package: the script is loaded from its file.
_spec = importlib.util.spec_from_file_location(
    "measure_style", REPOSITORY / "tests/measure_style.py"
)
assert _spec is not None
assert _spec.loader is not None
style = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = style
_spec.loader.exec_module(style)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def test_the_pages_are_in_plain_words() -> None:
    measured = style.total(style.pages())
    assert measured.words > 5000
    assert measured.per_mille("where") <= WHERE_PER_MILLE
    assert measured.per_mille("is no X") <= 0.3


def test_folders_are_small() -> None:
    files = Counter(
        name_of(path.parent) for path in style.sources() if path.name != "__init__.py"
    )
    assert {
        folder: count for folder, count in files.items() if count > FOLDER_FILES
    } == {}


def test_functions_are_short() -> None:
    found = {
        name_of(path): longest
        for path in style.sources()
        if (
            longest := list(
                style.long_functions(path.read_text(), limit=FUNCTION_LINES)
            )
        )
    }
    assert found == {}


def test_the_source_is_airy_commented_and_plain() -> None:
    measured = style.total(style.sources())
    assert measured.code_lines > 10_000
    assert measured.nodes_per_line <= NODES_PER_LINE
    assert measured.comment_share >= COMMENT_SHARE
    assert measured.per_mille("where") <= WHERE_PER_MILLE


# -------------------------------------------------------------------------------------- the measure

SOURCE = '''"""Say nothing where it is no use."""

import os


def run(count):
    """Run."""
    # Where the count is odd.
    return "if it is" if count % 2 else 0
'''


def test_a_source_is_measured() -> None:
    measured = style.measure_source(SOURCE)
    assert (measured.code_lines, measured.comments, measured.filled_lines) == (2, 1, 6)
    assert measured.dialect == {"where": 2, "nothing": 1, "is no X": 1}
    assert measured.words == 7 + 5 + 3
    # Module, docstring (2), import (2), function with its argument (3), docstring (2), return; the
    # conditional with its two values (3) and `count % 2` (5: count is a name to be loaded).
    assert measured.nodes == 19


def test_a_page_is_measured_without_its_code() -> None:
    page = "Where to look.\n```python\nwhere = nothing\n```\nNothing else.\n"
    measured = style.measure_page(page)
    assert (measured.words, measured.dialect["where"], measured.dialect["nothing"]) == (
        5,
        1,
        1,
    )


def test_long_functions_are_found_without_their_docstrings() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    a = 1\n    b = 2\n    return a + b\n'
    assert list(style.long_functions(source, limit=4)) == []
    assert list(style.long_functions(source, limit=3)) == [("f", 4)]
