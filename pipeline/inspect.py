"""Look at a dataset: `python -m pipeline.inspect URI --out sheet.png`.

A contact sheet of samples spread over all shards, and histograms of sizes, bytes and classes, on
one page.
"""

from __future__ import annotations

if __name__ == "__main__":
    # Before the imports below: Ctrl-C while they load ends in one line, not in a traceback.
    from pipeline.console import start_command

    start_command("pipeline.inspect")

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image

from pipeline import storage
from pipeline.console import Progress, run_command, say, say_json
from pipeline.dataset import Manifest, open_dataset
from pipeline.formats.table import FORMATS, NO_LABEL
from pipeline.images.encode import to_rgb
from pipeline.images.refused import RefusedError
from pipeline.options import Location, Pictures, PngFile
from pipeline.reading.reader import U8, ShardReader

_MAX_SURVEYED_SHARDS = 256
"""Shards whose rows are read for the histograms; of more, this many are read, evenly spread."""
_QUIET_S = 3.0
"""Seconds that reading may take without a word about its progress."""
_THUMBNAIL_PX = 128


@dataclass(frozen=True)
class Survey:
    """What the manifest says of the surveyed shards.

    Attributes:
        num_surveyed: samples looked at.
        widths, heights: pixels of each.
        sizes: encoded bytes of each.
        labels: class numbers, -1 for an image without a label.
        formats: samples by container format of the image.
    """

    num_surveyed: int
    widths: npt.NDArray[np.int32]
    heights: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    formats: dict[str, int]


def survey(dataset: Manifest) -> Survey:
    """Read the rows of evenly spread shards."""
    num_shards = dataset.info.num_shards
    count = min(num_shards, _MAX_SURVEYED_SHARDS)
    shards = np.unique(
        np.linspace(
            0,
            num_shards - 1,
            count,
        )
        .round()
        .astype(int)
    )
    tables = []
    label = f"Surveying {storage.name_of(dataset.uri)}"
    with Progress(
        label,
        total=len(shards),
        unit="shards",
        after_s=_QUIET_S,
    ) as progress:
        for shard in shards.tolist():
            tables.append(dataset.shard_table(shard))
            progress.advance(1)
    all_formats = np.concatenate([table.formats for table in tables])
    codes, counts = np.unique(all_formats, return_counts=True)
    return Survey(
        num_surveyed=sum(len(table) for table in tables),
        widths=np.concatenate([table.widths for table in tables]),
        heights=np.concatenate([table.heights for table in tables]),
        sizes=np.concatenate([table.sizes for table in tables]),
        labels=np.concatenate([table.labels for table in tables]),
        formats={
            FORMATS[code]: int(number)
            for code, number in zip(
                codes,
                counts,
                strict=True,
            )
        },
    )


def summary(dataset: Manifest, found: Survey) -> dict[str, Any]:
    """Give the figures of a dataset as plain numbers; quantiles are 0, 25, 50, 75 and 100%."""

    def quantiles(values: npt.NDArray[Any]) -> list[int]:
        return [
            int(value)
            for value in np.quantile(
                values,
                [0, 0.25, 0.5, 0.75, 1],
                method="nearest",
            )
        ]

    info = dataset.info
    labelled = found.labels[found.labels != NO_LABEL]
    return {
        "name": info.name,
        "format": info.format,
        "num_samples": info.num_samples,
        "num_shards": info.num_shards,
        "num_surveyed": found.num_surveyed,
        "fingerprint": info.fingerprint,
        "formats": found.formats,
        "width_px": quantiles(found.widths),
        "height_px": quantiles(found.heights),
        "image_bytes": quantiles(found.sizes),
        "num_labelled": len(labelled),
        "num_classes": len(np.unique(labelled)),
    }


def contact_sheet(dataset: Manifest, *, count: int) -> list[tuple[str, U8]]:
    """Read samples spread over the whole dataset, as small pictures with captions.

    Returns:
        (key and label, uint8 RGB thumbnail of at most 128 px); a picture that cannot be decoded is
        left black.
    """
    num_samples = dataset.info.num_samples
    spread = np.linspace(
        0,
        num_samples - 1,
        min(count, num_samples),
    )
    ids_B = np.unique(spread.astype(int))
    rows = dataset.lookup(ids_B)
    reader = ShardReader(dataset, verify_hashes="on")
    try:
        images, bad = reader.read(rows)
        # Copied: thumbnails outlive the reader's maps.
        encoded = [image.tobytes() for image in images]
    finally:
        reader.close()

    sheet = []
    for i, key in enumerate(dataset.keys(ids_B)):
        caption = _caption(
            dataset,
            key,
            int(rows.labels_B[i]),
        )
        try:
            if i in bad:
                raise RefusedError(bad[i])
            with Image.open(io.BytesIO(encoded[i])) as opened:
                small = to_rgb(opened)
            small.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
            sheet.append((caption, np.asarray(small)))
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:
            # Black, with the reason: a page of good pictures would hide what is wrong.
            black = np.zeros((_THUMBNAIL_PX, _THUMBNAIL_PX, 3), dtype=np.uint8)
            sheet.append((f"{key}\nbad: {error}"[:60], black))
    return sheet


def _caption(
    dataset: Manifest,
    key: str,
    label: int,
) -> str:
    """Return the key, and below it the class if the sample has one."""
    if label == NO_LABEL:
        return key
    classes = dataset.info.classes
    return f"{key}\n{classes[label] if classes else label}"


def draw(
    dataset: Manifest,
    found: Survey,
    sheet: list[tuple[str, U8]],
) -> bytes:
    """Draw the page; returns a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    columns = 8
    rows = math.ceil(len(sheet) / columns)
    figure = Figure(figsize=(columns * 1.6, rows * 1.9 + 3.6), layout="constrained")
    halves: Any = figure.subfigures(
        2,
        1,
        height_ratios=[3.2, max(rows, 1) * 1.9],
    )
    top, bottom = halves
    info = dataset.info
    top.suptitle(
        f"{info.name}: {info.num_samples:,} samples in {info.num_shards:,} shards ({info.format})"
    )
    plots = top.subplots(1, 3)
    plots[0].hist2d(
        found.widths,
        found.heights,
        bins=40,
        cmin=1,
    )
    plots[0].set(xlabel="width, pixels", ylabel="height, pixels")
    plots[1].hist(found.sizes / 1000, bins=40)
    plots[1].set(xlabel="encoded size, kB", ylabel="samples")
    labelled = found.labels[found.labels != NO_LABEL]
    plots[2].bar(*np.unique(labelled, return_counts=True), width=1.0)
    plots[2].set(
        xlabel="class",
        ylabel="samples",
        title="" if len(labelled) else "no labels",
    )
    cells = np.atleast_1d(bottom.subplots(max(rows, 1), columns)).ravel()
    for cell in cells:
        cell.axis("off")
    for cell, (caption, picture) in zip(
        cells,
        sheet,
        strict=False,
    ):
        cell.imshow(picture)
        cell.set_title(caption.replace("$", r"\$"), fontsize=5)
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        dpi=110,
        format="png",
    )
    return buffer.getvalue()


@dataclass(frozen=True)
class Arguments:
    """Draw a contact sheet and histograms of a dataset."""

    uri: Annotated[Location, tyro.conf.Positional, tyro.conf.arg(metavar="URI")]
    """Folder of the dataset: a path, s3://, gs:// or az://; or some of its shards, as a pattern in
    quotes such as 'data/train-*.tar' or 'data/train-{0000..0003}.tar', or a list with commas."""
    out: PngFile = "sheet.png"
    """PNG file to write."""
    count: Pictures = 48
    """Pictures on the sheet."""
    json: bool = False
    """Write the figures to stdout as JSON."""


def _run(arguments: Arguments) -> int:
    """Write the page and report the figures."""
    dataset = open_dataset(arguments.uri)
    surveyed = survey(dataset)
    sheet = contact_sheet(dataset, count=arguments.count)
    storage.write_atomic(
        str(Path(arguments.out)),
        draw(
            dataset,
            surveyed,
            sheet,
        ),
    )
    figures = summary(dataset, surveyed)
    if arguments.json:
        say_json(figures)
        return 0
    for name, value in figures.items():
        say(f"{name:>14}  {value}")
    say(f"inspect: wrote {arguments.out}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_command(
        _run,
        Arguments,
        args,
        module="pipeline.inspect",
        interrupted="inspect: stopped before the page was written: run the same command again.",
    )
