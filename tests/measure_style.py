"""Measure how dense the code is and how the prose reads: `python tests/measure_style.py [PATH]`.

Nodes per line, share of comments, longest functions, files per folder, and the words of the dialect
per thousand words of prose (docstrings, comments, messages, and the pages). The limits are held by
tests/unit/test_house_style.py.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGES = ("pipeline", "model", "train", "deploy")
DIALECT = {
    "where": r"\bwhere\b",
    "nothing": r"\bnothing\b",
    "is no X": r"\bis no \w",
}
"""Words that stand for if/when, for None/empty, and for "is not a valid X", by name."""


@dataclass
class Style:
    """Counts of one file, or of several together."""

    nodes: int = 0
    code_lines: int = 0
    """Lines without blank, comment, docstring and import lines."""
    comments: int = 0
    filled_lines: int = 0
    words: int = 0
    dialect: Counter[str] = field(default_factory=Counter)

    def add(self, other: Style) -> None:
        """Add the counts of another file."""
        self.nodes += other.nodes
        self.code_lines += other.code_lines
        self.comments += other.comments
        self.filled_lines += other.filled_lines
        self.words += other.words
        self.dialect.update(other.dialect)

    def add_prose(self, text: str) -> None:
        """Count the words of a text."""
        self.words += len(re.findall(r"[A-Za-z']+", text))
        for name, pattern in DIALECT.items():
            self.dialect[name] += len(re.findall(pattern, text, re.IGNORECASE))

    @property
    def nodes_per_line(self) -> float:
        """Syntax nodes per line of code."""
        return self.nodes / max(1, self.code_lines)

    @property
    def comment_share(self) -> float:
        """Comments per line that is not blank."""
        return self.comments / max(1, self.filled_lines)

    def per_mille(self, name: str) -> float:
        """Occurrences of a word of the dialect per thousand words."""
        return 1000 * self.dialect[name] / max(1, self.words)


def measure_source(text: str) -> Style:
    """Count one Python file."""
    style = Style()
    docstring_lines: set[int] = set()
    import_lines: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        style.nodes += 1
        if isinstance(node, ast.Import | ast.ImportFrom):
            import_lines.update(_lines_of(node))
        if isinstance(node, ast.Expr) and _text_of(node.value):
            docstring_lines.update(_lines_of(node))
        # A string with a blank in it is prose: a docstring, a help text or a message.
        if " " in _text_of(node).strip():
            style.add_prose(_text_of(node))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            style.comments += 1
            style.add_prose(token.string)
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        style.filled_lines += 1
        is_comment = line.lstrip().startswith("#")
        style.code_lines += not (is_comment or number in docstring_lines | import_lines)
    return style


def measure_page(text: str) -> Style:
    """Count the prose of a Markdown page, without blocks of code."""
    style = Style()
    style.add_prose(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return style


def long_functions(text: str, *, limit: int) -> Iterator[tuple[str, int]]:
    """Yield (name, lines) of the functions that are longer than a limit, docstrings left out."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = len(_lines_of(node))
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            lines -= len(_lines_of(first))
        if lines > limit:
            yield node.name, lines


def _text_of(node: ast.AST) -> str:
    """Return a string constant; empty for any other node."""
    return (
        node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        else ""
    )


def _lines_of(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def tracked(*patterns: str) -> list[Path]:
    """List files of the repository that git knows, or would add."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *patterns,
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    paths = [REPOSITORY / name for name in done.stdout.splitlines()]
    return sorted({path for path in paths if path.is_file()})


def sources() -> list[Path]:
    """List the source files of the four packages."""
    return [path for path in tracked(*PACKAGES) if path.suffix == ".py"]


def pages() -> list[Path]:
    """List the pages: README, CHANGELOG, CONTRIBUTING and docs, without the benchmarks."""
    found = tracked("*.md")
    return [
        path for path in found if "benchmarks" not in path.relative_to(REPOSITORY).parts
    ]


def total(paths: Iterable[Path]) -> Style:
    """Count several files together."""
    style = Style()
    for path in paths:
        text = path.read_text(encoding="utf-8")
        style.add(measure_page(text) if path.suffix == ".md" else measure_source(text))
    return style


def _line(name: str, style: Style) -> str:
    dialect = "  ".join(f"{word} {style.per_mille(word):.1f}" for word in DIALECT)
    if not style.code_lines:
        return f"{name:<44}{style.words:>7} words  {dialect} (per 1,000)"
    return (
        f"{name:<44}{style.words:>7} words  {dialect} (per 1,000)  "
        f"nodes/line {style.nodes_per_line:.2f}  comments {100 * style.comment_share:.1f}%"
    )


def main(arguments: list[str]) -> int:
    """Print a line for each folder and page; if paths are given, for each of their files."""
    if arguments:
        chosen = [path for path in tracked(*arguments) if path.suffix in (".py", ".md")]
        for path in chosen:
            sys.stdout.write(
                _line(str(path.relative_to(REPOSITORY)), total([path])) + "\n"
            )
        return 0
    sys.stdout.write(_line("source", total(sources())) + "\n")
    for folder in sorted({path.parent for path in sources()}):
        inside = [path for path in sources() if path.parent == folder]
        sys.stdout.write(
            _line(f"  {folder.relative_to(REPOSITORY)}", total(inside)) + "\n"
        )
    sys.stdout.write(_line("pages", total(pages())) + "\n")
    for path in pages():
        sys.stdout.write(
            _line(f"  {path.relative_to(REPOSITORY)}", total([path])) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
