"""Rows of figures, as tables for a person and as JSON for a program: one source, the same names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.bench.turns import Spread

Row = Mapping[str, Any]
"""Figures and what they are of, by column; units are suffixes of the columns' names."""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lay rows of cells out as a Markdown table."""
    titles = " | ".join(header)
    rule = "|---" * len(header)
    lines = [f"| {titles} |", f"{rule}|"]
    for cells in rows:
        texts = " | ".join(str(cell) for cell in cells)
        lines.append(f"| {texts} |")
    return "\n".join(lines)


def rows_table(rows: Sequence[Row]) -> str:
    """Lay rows out as a Markdown table, a spread as `median (lowest-highest)`."""
    # A row that has a problem may lack the figures of the others.
    known: dict[str, None] = {}
    for row in rows:
        known.update(dict.fromkeys(row))
    columns = list(known)
    cells = []
    for row in rows:
        row_cells = []
        for column in columns:
            row_cells.append(_cell(row.get(column)))
        cells.append(row_cells)
    return markdown_table(columns, cells)


def to_json(row: Row) -> dict[str, Any]:
    """Write spreads out as three keys: `step_s` becomes step_s, step_min_s and step_max_s."""
    plain: dict[str, Any] = {}
    for column, value in row.items():
        if not isinstance(value, Spread):
            plain[column] = value
            continue
        stem, _, unit = column.rpartition("_")
        # `median_s` names the middle already; a ratio may have no unit.
        if stem in ("", "median"):
            stem = ""
        else:
            stem = f"{stem}_"
        plain[column] = value.median
        plain[f"{stem}min_{unit}"] = value.low
        plain[f"{stem}max_{unit}"] = value.high
    return plain


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Spread):
        middle = _number(value.median)
        low = _number(value.low)
        high = _number(value.high)
        return f"{middle} ({low}-{high})"
    if isinstance(value, float):
        return _number(value)
    return str(value)


def _number(value: float) -> str:
    """Write about four digits, and never an exponent for what is large."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:.1f}"
    return f"{value:.4g}"
