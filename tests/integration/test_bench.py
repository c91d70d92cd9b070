"""The loader benchmark: what it says of a dataset, what it compares, and the report it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from pipeline.bench.__main__ import main
from pipeline.bench.peers import PeerRow, measure_peers
from pipeline.bench.photos import VARIANTS, make_sources
from pipeline.bench.probes import machine
from pipeline.bench.report import BARS, as_table, bars_table, write_report
from pipeline.bench.subjects import SUBJECTS, Setup
from pipeline.decoders.tuning import read_tuning


@pytest.mark.parametrize(
    ("decoder", "interpolation", "output"),
    [
        ("auto", "bicubic", "uint8"),
        ("turbo", "area", "uint8"),
        ("dali", "bilinear", "normalised"),
    ],
)
def test_a_dataset_is_measured(make_dataset, capsys, decoder, interpolation, output):
    words = ["--decoder", decoder, "--interpolation", interpolation, "--output", output]
    shape = [
        "--seconds",
        "0.2",
        "--batch-size",
        "8",
        "--size",
        "32",
        "--num-threads",
        "1",
    ]
    assert main([make_dataset(), *words, *shape, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_images"] % 8 == 0
    assert found["images_per_s"] > 0
    assert found["cpu_ms_per_image"] > 0
    assert found["num_bad"] == 0
    assert set(found["stages"]) == {"read", "decode", "copy", "wait"}
    assert (
        found["stages"]["copy"]["items"] == found["num_images"]
    )  # what was taken, and nothing of the warm-up
    assert main([make_dataset(), *words, *shape]) == 0
    assert "CPU-ms per image" in capsys.readouterr().out


def test_mistakes_are_refused(make_dataset, capsys):
    assert main([]) == 2
    assert main([make_dataset(), "--peers"]) == 2
    assert main([make_dataset(), "--seconds", "0"]) == 2
    assert (
        "either a dataset's URI, with or without --tune, or --peers"
        in capsys.readouterr().err
    )
    assert main(["nowhere"]) == 3


def test_tuning_writes_what_the_loader_reads(make_dataset, tmp_path, capsys):
    folder, path = make_dataset(), tmp_path / "deep" / "tuned.toml"
    shape = [
        "--seconds",
        "0.05",
        "--batch-size",
        "8",
        "--size",
        "32",
        "--repeats",
        "1",
        "--interpolation",
        "area",
    ]
    assert (
        main(
            [
                folder,
                "--tune",
                "--device",
                "cpu",
                "--tuning-file",
                str(path),
                *shape,
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    rates = [entry["rates"][0] for entry in found["images_per_s"]]
    assert rates == sorted(rates, reverse=True)
    assert {entry["decoder"] for entry in found["images_per_s"]} == {"turbo", "ffcv"}
    tuned = read_tuning(str(path), device=torch.device("cpu"))
    assert tuned.model_dump() == found["best"]


def test_every_bar_compares_what_is_measured():
    names = [
        (subject.name, subject.dataset, subject.resize_filter) for subject in SUBJECTS
    ]
    assert len(set(names)) == len(names)
    for bar in BARS:
        assert bar.subject in names
        assert bar.other in names
    assert {subject.dataset for subject in SUBJECTS} <= {*VARIANTS, "images"}


def test_the_report_is_written_anew_between_its_marks(tmp_path: Path):
    def made(subject, scale):
        times = [scale * value for value in (1.0, 1.2, 1.1)]
        return PeerRow(
            subject.name,
            subject.dataset,
            subject.resize_filter,
            0.5,
            times,
            [900.0, 800.0, 850.0],
            300.0,
        )

    found = [made(subject, 1 + number) for number, subject in enumerate(SUBJECTS)]
    found[1] = dataclasses.replace(
        found[1], problem="not installed (webdataset)", cpu_ms_per_image=[]
    )
    path = tmp_path / "loaders.md"
    path.write_text(
        "# Title\n\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nWhat follows.\n"
    )
    write_report(path, found, machine())
    text = path.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("What follows.\n")
    assert "old" not in text
    assert as_table(found) in text
    assert bars_table(found) in text
    assert (
        "| webdataset + PIL | originals | bicubic | not installed (webdataset) |  |  |  |"
        in text
    )
    assert (
        "| turbo / bare loop | CPU time | originals, bicubic | 0.83 (0.83-0.83) | <= 1.10 | met |"
        in text
    )
    assert (
        "| turbo / FFCV Loader | images/s | beton-256, area | 1.00 (1.00-1.00) | >= 1.40 | not met "
        "|" in text
    )
    assert (tmp_path / "loaders.png").stat().st_size > 10_000


@pytest.mark.slow
def test_peers_are_measured_in_processes_that_end(tmp_path: Path):
    make_sources(tmp_path, num_images=48, variants=("originals", "beton-256"))
    wanted = {
        ("torch DataLoader + PIL", "images"),
        ("webdataset + PIL", "originals"),
        ("DALI's own pipeline", "originals"),
        ("maelstrom turbo", "beton-256"),
        ("maelstrom ffcv", "beton-256"),
        ("bare loop", "originals"),
    }
    subjects = [
        subject for subject in SUBJECTS if (subject.name, subject.dataset) in wanted
    ]
    found = measure_peers(
        Setup(tmp_path, 1, 8), repeats=2, seconds=0.2, subjects=subjects
    )
    for subject in found:
        assert not subject.problem
        assert len(subject.cpu_ms_per_image) == 2
        assert min(subject.cpu_ms_per_image) > 0
