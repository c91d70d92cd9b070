"""Figures of the loader benchmark: a table, ratios against the bars it is held to, and a chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.bench.peers import PeerRow
from pipeline.bench.rows import markdown_table
from pipeline.bench.turns import Spread, divide_pairs

_START, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
Key = tuple[str, str, str]
"""A subject: name, dataset, filter."""


@dataclass(frozen=True)
class Bar:
    """A limit on one subject relative to another.

    Args:
        what: In words.
        subject: What is held to it.
        other: What it is compared with.
        limit: Largest ratio of CPU time per image; smallest of images/s.
        figure: Which of the two.
    """

    what: str
    subject: Key
    other: Key
    limit: float
    figure: Literal["CPU time", "images/s"] = "CPU time"


_TURBO = "maelstrom turbo"
_KERNELS = "maelstrom ffcv"
_DALI = "DALI's own pipeline"
_PILLOW = ("torch DataLoader + PIL", "images", "bicubic")


def _against_ffcv(dataset: str, cpu_limit: float, wall_limit: float) -> Iterator[Bar]:
    other = ("FFCV Loader", dataset, "area")
    for name in (_TURBO, _KERNELS):
        what = f"{name.removeprefix('maelstrom ')} / FFCV Loader"
        subject = (name, dataset, "area")
        yield Bar(what, subject, other, cpu_limit)
        yield Bar(what, subject, other, wall_limit, "images/s")


BARS = (
    Bar("turbo / torch + PIL", (_TURBO, "originals", "bicubic"), _PILLOW, 0.40),
    Bar(
        "turbo / bare loop",
        (_TURBO, "originals", "bicubic"),
        ("bare loop", "originals", "bicubic"),
        1.10,
    ),
    Bar(
        "turbo / bare loop",
        (_TURBO, "originals", "area"),
        ("bare loop", "originals", "area"),
        1.10,
    ),
    Bar(
        "our order in DALI / DALI's",
        ("maelstrom dali", "originals", "bicubic"),
        (_DALI, "originals", "bicubic"),
        1.05,
    ),
    *_against_ffcv("beton-512", 0.90, 1.15),
    *_against_ffcv("beton-256", 0.75, 1.4),
    *_against_ffcv("beton-256-raw", 0.60, 1.8),
    *(
        Bar("256 px / torch + PIL on originals", row, _PILLOW, 0.10)
        for row in (
            (_TURBO, "tar-256", "bicubic"),
            (_TURBO, "beton-256", "bicubic"),
            (_TURBO, "beton-256", "area"),
            (_TURBO, "beton-256-raw", "bicubic"),
        )
    ),
)
"""What this loader is held to, as ratios: they carry over to other machines better than times."""
GPU_BARS_PER_S = {"originals": 5_000, "tar-320": 8_500}
"""Images/s that a GPU must be fed with, by dataset: an H100's demand in training the smaller
models."""


def as_table(rows: Sequence[PeerRow]) -> str:
    """Return the figures as a Markdown table: CPU-ms and images/s as median (lowest-highest)."""
    header = (
        *("loader", "data", "filter", "CPU-ms per image"),
        *("images/s", "first batch, s", "memory, MiB"),
    )
    cells = [_cells(row) for row in rows]
    return markdown_table(header, cells)


def _cells(row: PeerRow) -> tuple[str, ...]:
    # A loader that is not installed keeps its row: a table without it would look complete.
    if row.problem or not row.cpu_ms_per_image:
        problem = row.problem or "not measured"
        figures = (problem, "", "", "")
    else:
        cpu_ms = Spread.of(row.cpu_ms_per_image)
        rate = Spread.of(row.images_per_s)
        figures = (
            cpu_ms.text(".3f"),
            rate.text(",.0f"),
            f"{row.first_batch_s:.1f}",
            f"{row.rss_mib:,.0f}",
        )
    return (row.name, row.dataset, row.resize_filter, *figures)


def bars_table(rows: Sequence[PeerRow]) -> str:
    """Return the ratios against their bars: the median over rounds of the ratio in each round."""
    by_key: dict[Key, PeerRow] = {}
    for row in rows:
        key = (row.name, row.dataset, row.resize_filter)
        by_key[key] = row
    table = []
    for bar in BARS:
        ours = by_key.get(bar.subject)
        other = by_key.get(bar.other)
        # Either is missing when its package is not installed: no ratio, no verdict.
        if (
            ours is not None
            and other is not None
            and ours.images_per_s
            and other.images_per_s
        ):
            table.append(_bar_cells(bar, ours, other))
    for dataset, limit in GPU_BARS_PER_S.items():
        mixed = [row for row in rows if row.dataset == dataset and "engine" in row.name]
        rates = [Spread.of(row.images_per_s) for row in mixed if row.images_per_s]
        if not rates:
            continue
        # The best share of the JPEG engine counts: `--tune` finds it on every machine.
        best = max(rates, key=lambda rate: rate.median)
        if best.median >= limit:
            verdict = "met"
        else:
            verdict = "not met"
        rate = best.text(",.0f")
        at_least = f">= {limit:,}"
        table.append(("DALI mixed", "images/s", dataset, rate, at_least, verdict))
    return markdown_table(("ratio", "of", "data, filter", "measured", "bar", ""), table)


def _bar_cells(bar: Bar, ours: PeerRow, other: PeerRow) -> tuple[str, ...]:
    # Less CPU time is better, more images: the limit is an upper one or a lower one.
    if bar.figure == "CPU time":
        ratio = divide_pairs(ours.cpu_ms_per_image, other.cpu_ms_per_image)
        is_met = ratio.median <= bar.limit
        sign = "<="
    else:
        ratio = divide_pairs(ours.images_per_s, other.images_per_s)
        is_met = ratio.median >= bar.limit
        sign = ">="
    _, dataset, resize_filter = bar.subject
    verdict = "met" if is_met else "not met"
    limit = f"{sign} {bar.limit:.2f}"
    data = f"{dataset}, {resize_filter}"
    return (bar.what, bar.figure, data, ratio.text(), limit, verdict)


def write_report(path: Path, rows: Sequence[PeerRow], about: dict[str, Any]) -> None:
    """Replace the measured part of a Markdown file, and draw the chart next to it."""
    text = f"# Loaders\n\n{_START}\n{_END}\n"
    if path.exists():
        text = path.read_text()
    # What a person wrote around the measured part stays.
    head, _, rest = text.partition(_START)
    _, _, tail = rest.partition(_END)
    chart = path.with_suffix(".png")
    draw(chart, rows)
    words = []
    for name, value in about.items():
        words_of_name = name.replace("_", " ")
        words.append(f"{words_of_name} {value}")
    facts = ", ".join(words)
    num_rounds = len(rows[0].cpu_ms_per_image)
    blocks = (
        _START,
        f"Machine: {facts}.\n{num_rounds} interleaved rounds; median (lowest-highest).",
        as_table(rows),
        bars_table(rows),
        f"![CPU time per image]({chart.name})",
        _END,
    )
    measured = "\n\n".join(blocks)
    path.write_text(head + measured + tail)


def draw(path: Path, rows: Sequence[PeerRow]) -> None:
    """Draw CPU time per image, with the lowest and highest of the rounds."""
    # `Figure` itself, not pyplot, which keeps global state and may look for a display.
    from matplotlib.figure import Figure

    # A bar chart fills from below: the table's first row goes on top.
    shown = [row for row in rows if row.cpu_ms_per_image]
    shown.reverse()
    times = [Spread.of(row.cpu_ms_per_image) for row in shown]
    names = []
    for row in shown:
        names.append(f"{row.name}: {row.dataset}, {row.resize_filter}")
    is_ours = [row.name.startswith("maelstrom") for row in shown]
    colours = ["tab:orange" if ours else "tab:grey" for ours in is_ours]
    below = [time.median - time.low for time in times]
    above = [time.high - time.median for time in times]
    middles = [time.median for time in times]

    height_inches = 0.32 * len(shown) + 1
    figure = Figure(figsize=(9, height_inches), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, middles, xerr=[below, above], color=colours, height=0.7)
    for height, time in enumerate(times):
        text = f"  {time.median:.2f}"
        axes.annotate(text, (time.high, height), va="center", fontsize=8)
    axes.set_xlabel("CPU-ms per image (all threads and workers), lower is better")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
