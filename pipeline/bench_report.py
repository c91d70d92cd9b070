"""What the loader benchmark found, as a table, as ratios against the bars it is held to, and as a chart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.bench_peers import Measured

_START, _END = "<!-- measured: begin -->", "<!-- measured: end -->"


@dataclass(frozen=True)
class Bar:
    """A limit on one subject's CPU time relative to another's.

    Args:
        what: In words.
        subject: (name, dataset, filter) that is held to it.
        other: What it is compared with.
        limit: Largest ratio.
    """

    what: str
    subject: tuple[str, str, str]
    other: tuple[str, str, str]
    limit: float


_OURS, _PIL, _DALI, _FFCV = "maelstrom turbo", "torch DataLoader + PIL", "DALI's own pipeline", "FFCV Loader"
BARS = (
    Bar("turbo / torch + PIL", (_OURS, "originals", "bicubic"), (_PIL, "images", "bicubic"), 0.40),
    Bar("turbo / bare loop", (_OURS, "originals", "bicubic"), ("bare loop", "originals", "bicubic"), 1.10),
    Bar("turbo / bare loop", (_OURS, "originals", "area"), ("bare loop", "originals", "area"), 1.10),
    Bar(
        "our order in DALI / DALI's", ("maelstrom dali", "originals", "bicubic"), (_DALI, "originals", "bicubic"), 1.05
    ),
    Bar("turbo / FFCV", (_OURS, "beton-256", "area"), (_FFCV, "beton-256", "area"), 0.75),
    Bar("turbo / FFCV", (_OURS, "beton-512", "area"), (_FFCV, "beton-512", "area"), 0.90),
    Bar("turbo / FFCV", (_OURS, "beton-256-raw", "area"), (_FFCV, "beton-256-raw", "area"), 0.60),
    Bar("256 px / torch + PIL on originals", (_OURS, "tar-256", "bicubic"), (_PIL, "images", "bicubic"), 0.10),
)
"""What this loader is held to, as ratios of CPU time an image: they carry over to other machines better than times."""


def as_table(found: Sequence[Measured]) -> str:
    """Return the measurements as a Markdown table: CPU-ms and images/s as median (lowest-highest)."""
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
            f"{head}{_spread(subject.cpu_ms_per_image, '.3f')} | {_spread(subject.images_per_s, ',.0f')} | "
            f"{subject.first_batch_s:.1f} | {subject.rss_mib:,.0f} |"
        )
    return "\n".join(lines)


def bars_table(found: Sequence[Measured]) -> str:
    """Return the ratios against their bars: the median over rounds of the ratio within each round."""
    by_name = {(subject.name, subject.dataset, subject.resize_filter): subject for subject in found}
    lines = ["| ratio of CPU time | data, filter | measured | bar | |", "|---|---|---|---|---|"]
    for bar in BARS:
        ours, other = by_name.get(bar.subject), by_name.get(bar.other)
        if ours is None or other is None or not (ours.cpu_ms_per_image and other.cpu_ms_per_image):
            continue
        pairs = zip(ours.cpu_ms_per_image, other.cpu_ms_per_image, strict=False)
        ratios = [mine / theirs for mine, theirs in pairs]
        met = "met" if median(ratios) <= bar.limit else "not met"
        data = f"{bar.subject[1]}, {bar.subject[2]}"
        lines.append(f"| {bar.what} | {data} | {_spread(ratios, '.2f')} | {bar.limit:.2f} | {met} |")
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
        f"{_START}\n\nMachine: {facts}.\n{len(found[0].cpu_ms_per_image)} interleaved rounds; median (lowest-highest)."
        f"\n\n{as_table(found)}\n\n{bars_table(found)}\n\n![CPU time an image]({chart.name})\n\n{_END}"
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
        [middle - min(subject.cpu_ms_per_image) for middle, subject in zip(middles, shown, strict=True)],
        [max(subject.cpu_ms_per_image) - middle for middle, subject in zip(middles, shown, strict=True)],
    ]
    colours = ["tab:orange" if subject.name.startswith("maelstrom") else "tab:grey" for subject in shown]
    names = [f"{subject.name}: {subject.dataset}, {subject.resize_filter}" for subject in shown]
    axes.barh(names, middles, xerr=spreads, color=colours, height=0.7)
    for place, (middle, subject) in enumerate(zip(middles, shown, strict=True)):
        axes.annotate(f"  {middle:.2f}", (max(subject.cpu_ms_per_image), place), va="center", fontsize=8)
    axes.set_xlabel("CPU-ms an image (all threads and workers), lower is better")
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
