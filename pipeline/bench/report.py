"""What the loader benchmark found, as a table, as ratios against the bars it is held to, and as a
chart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pipeline.bench.peers import Measured

_START, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
Row = tuple[str, str, str]
"""A subject: name, dataset, filter."""


@dataclass(frozen=True)
class Bar:
    """A limit on one subject relative to another.

    Args:
        what: In words.
        subject: What is held to it.
        other: What it is compared with.
        limit: Largest ratio of CPU time an image; smallest of images/s.
        figure: Which of the two.
    """

    what: str
    subject: Row
    other: Row
    limit: float
    figure: Literal["CPU time", "images/s"] = "CPU time"


_OURS, _KERNELS, _PIL, _DALI = (
    "maelstrom turbo",
    "maelstrom ffcv",
    "torch DataLoader + PIL",
    "DALI's own pipeline",
)
_PEER = (_PIL, "images", "bicubic")


def _against_ffcv(dataset: str, cpu_limit: float, wall_limit: float) -> Iterator[Bar]:
    other = ("FFCV Loader", dataset, "area")
    for name in (_OURS, _KERNELS):
        what = f"{name.removeprefix('maelstrom ')} / FFCV Loader"
        yield Bar(what, (name, dataset, "area"), other, cpu_limit)
        yield Bar(what, (name, dataset, "area"), other, wall_limit, "images/s")


BARS = (
    Bar("turbo / torch + PIL", (_OURS, "originals", "bicubic"), _PEER, 0.40),
    Bar(
        "turbo / bare loop",
        (_OURS, "originals", "bicubic"),
        ("bare loop", "originals", "bicubic"),
        1.10,
    ),
    Bar(
        "turbo / bare loop", (_OURS, "originals", "area"), ("bare loop", "originals", "area"), 1.10
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
        Bar("256 px / torch + PIL on originals", row, _PEER, 0.10)
        for row in (
            (_OURS, "tar-256", "bicubic"),
            (_OURS, "beton-256", "bicubic"),
            (_OURS, "beton-256", "area"),
            (_OURS, "beton-256-raw", "bicubic"),
        )
    ),
)
"""What this loader is held to, as ratios: they carry over to other machines better than times."""
GPU_BARS_PER_S = {"originals": 5_000, "tar-320": 8_500}
"""Images/s that a GPU must be fed with, by dataset: an H100's demand in training the smaller
models."""


def as_table(found: Sequence[Measured]) -> str:
    """Return the measurements as a Markdown table: CPU-ms and images/s as median
    (lowest-highest)."""
    lines = [
        "| loader | data | filter | CPU-ms an image | images/s | first batch, s | memory, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for subject in found:
        head = f"| {subject.name} | {subject.dataset} | {subject.resize_filter} | "
        if subject.problem or not subject.cpu_ms_per_image:
            lines.append(f"{head}{subject.problem or 'not measured'} | | | |")
            continue
        lines.append(
            f"{head}{_spread(subject.cpu_ms_per_image, '.3f')} | "
            f"{_spread(subject.images_per_s, ',.0f')} | "
            f"{subject.first_batch_s:.1f} | {subject.rss_mib:,.0f} |"
        )
    return "\n".join(lines)


def bars_table(found: Sequence[Measured]) -> str:
    """Return the ratios against their bars: the median over rounds of the ratio within each
    round."""
    by_name = {(subject.name, subject.dataset, subject.resize_filter): subject for subject in found}
    lines = ["| ratio | of | data, filter | measured | bar | |", "|---|---|---|---|---|---|"]
    for bar in BARS:
        ours, other = by_name.get(bar.subject), by_name.get(bar.other)
        if ours is None or other is None or not (ours.cpu_ms_per_image and other.cpu_ms_per_image):
            continue
        by_cpu = bar.figure == "CPU time"
        mine, theirs = (
            (row.cpu_ms_per_image if by_cpu else row.images_per_s) for row in (ours, other)
        )
        ratios = [a / b for a, b in zip(mine, theirs, strict=False)]
        met = median(ratios) <= bar.limit if by_cpu else median(ratios) >= bar.limit
        lines.append(
            f"| {bar.what} | {bar.figure} | {bar.subject[1]}, {bar.subject[2]} | "
            f"{_spread(ratios, '.2f')} | "
            f"{'<=' if by_cpu else '>='} {bar.limit:.2f} | {'met' if met else 'not met'} |"
        )
    for dataset, limit in GPU_BARS_PER_S.items():
        rates = [
            row.images_per_s for row in found if row.dataset == dataset and "engine" in row.name
        ]
        if best := max((rate for rate in rates if rate), key=median, default=None):
            verdict = "met" if median(best) >= limit else "not met"
            lines.append(
                f"| DALI mixed | images/s | {dataset} | {_spread(best, ',.0f')} | >= {limit:,} | "
                f"{verdict} |"
            )
    return "\n".join(lines)


def write_report(path: Path, found: Sequence[Measured], about: dict[str, Any]) -> None:
    """Replace the measured part of a Markdown file, and draw the chart beside it."""
    text = path.read_text() if path.exists() else f"# Loaders\n\n{_START}\n{_END}\n"
    head, _, rest = text.partition(_START)
    _, _, tail = rest.partition(_END)
    chart = path.with_suffix(".png")
    draw(chart, found)
    facts = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items())
    measured = (
        f"{_START}\n\nMachine: {facts}.\n{len(found[0].cpu_ms_per_image)} interleaved rounds; "
        "median (lowest-highest)."
        f"\n\n{as_table(found)}\n\n{bars_table(found)}\n\n![CPU time an "
        f"image]({chart.name})\n\n{_END}"
    )
    path.write_text(head + measured + tail)


def draw(path: Path, found: Sequence[Measured]) -> None:
    """Draw CPU time an image, with the lowest and highest of the rounds."""
    from matplotlib.figure import Figure

    shown = [subject for subject in found if subject.cpu_ms_per_image][::-1]
    figure = Figure(figsize=(9, 0.32 * len(shown) + 1), layout="constrained")
    axes = figure.subplots()
    middles = [median(subject.cpu_ms_per_image) for subject in shown]
    spreads = [
        [
            middle - min(subject.cpu_ms_per_image)
            for middle, subject in zip(middles, shown, strict=True)
        ],
        [
            max(subject.cpu_ms_per_image) - middle
            for middle, subject in zip(middles, shown, strict=True)
        ],
    ]
    colours = [
        "tab:orange" if subject.name.startswith("maelstrom") else "tab:grey" for subject in shown
    ]
    names = [f"{subject.name}: {subject.dataset}, {subject.resize_filter}" for subject in shown]
    axes.barh(names, middles, xerr=spreads, color=colours, height=0.7)
    for place, (middle, subject) in enumerate(zip(middles, shown, strict=True)):
        axes.annotate(
            f"  {middle:.2f}", (max(subject.cpu_ms_per_image), place), va="center", fontsize=8
        )
    axes.set_xlabel("CPU-ms an image (all threads and workers), lower is better")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
