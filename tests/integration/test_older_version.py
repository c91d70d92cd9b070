"""What version 0.1.0 wrote, the code of today reads: datasets, a killed conversion, a run.

A change that breaks this takes the datasets and runs of everybody who upgrades. How the files were
made: tests/data/version-0.1.0/README.md.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from pipeline.loader import Batch, Loader
from pipeline.verify import verify
from tests import launch
from train.objectives.choose import choose_objective
from train.objectives.mae import MASK_NOISE
from train.process.outcome import read_status
from train.report.metrics_file import read_metrics
from train.settings.command_line import parse_run

WRITTEN = Path(__file__).parents[1] / "data" / "version-0.1.0"
ROUNDING = 2e-5
"""Relative difference of losses between processors, which add in other orders. Adam without its
moments differs by more from the second step after a resume on."""
FORMATS = ("webdataset", "beton")


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((WRITTEN / "expected.json").read_text())
    return content


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files to where they may be changed, betons unpacked."""
    folder = tmp_path_factory.mktemp("older") / "files"
    shutil.copytree(WRITTEN, folder)
    for packed in folder.glob("beton/*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ----------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize("container", FORMATS)
def test_a_dataset_opens_and_verifies(
    written: Path, expected: dict[str, Any], container: str
):
    dataset = open_dataset(str(written / container))
    assert dataset.info.fingerprint == expected["fingerprint"][container]
    assert (dataset.info.num_samples, dataset.info.num_shards) == (12, 2)
    assert dataset.info.classes == ["astronaut", "chelsea", "coffee", "rocket"]
    verdict = verify(str(written / container), full=True)
    assert not verdict.problems
    assert verdict.num_samples == 12


def test_verifying_sees_a_byte_that_changed(written: Path, tmp_path: Path):
    shutil.copytree(written / "webdataset", tmp_path / "copy")
    shard = tmp_path / "copy" / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(b"\xff\xd8") + 300] ^= 1
    shard.write_bytes(content)
    assert verify(str(tmp_path / "copy"), full=True).problems


def test_a_killed_conversion_is_completed_to_the_same_bytes(written: Path):
    # Pictures are stored as they are, under their own names: the dataset gives its source back.
    source = written / "source"
    for shard in sorted((written / "webdataset").glob("*.tar")):
        with tarfile.open(shard) as tar:
            pictures = [
                member for member in tar.getmembers() if member.name.endswith(".jpg")
            ]
            tar.extractall(source, members=pictures, filter="data")

    half_done = written / "half-done"
    kept_ns = (half_done / "train-000000.tar").stat().st_mtime_ns
    info = convert(
        str(source), str(half_done), ConvertSettings(samples_per_shard=6), workers=1
    )
    made = hashes(half_done)
    wanted = hashes(written / "webdataset")
    assert (half_done / "train-000000.tar").stat().st_mtime_ns == kept_ns, "made again"
    assert (
        info.fingerprint == open_dataset(str(written / "webdataset")).info.fingerprint
    )

    # dataset.json names the versions of this program and of pyarrow, which writes the manifest.
    about = json.loads((half_done / "dataset.json").read_text())
    if (about["made_by"]["version"], pa.__version__) != ("0.1.0", "26.0.1"):
        for name in ("dataset.json", "manifest.parquet"):
            assert name in made
            del made[name], wanted[name]
    assert made == wanted


# --------------------------------------------------------------------------------- order and losses


def describe(batch: Batch) -> dict[str, Any]:
    """Say of a micro-batch what the older version's description says."""
    noise_BN = batch.draws[MASK_NOISE].numpy()
    # One tuple entry per view; a masked autoencoder has one view.
    (boxes,) = batch.boxes
    return {
        "sample_ids": batch.sample_ids_B.tolist(),
        "epochs": batch.epochs_B.tolist(),
        "labels": batch.labels_B.tolist(),
        "tops": boxes.tops_B.tolist(),
        "lefts": boxes.lefts_B.tolist(),
        "heights": boxes.heights_B.tolist(),
        "widths": boxes.widths_B.tolist(),
        "flips": boxes.flips_B.tolist(),
        "mask_noise_sha256": hashlib.sha256(
            noise_BN.astype("<f4").tobytes()
        ).hexdigest(),
        "pixel_mean": float(batch.images_BCHW.double().mean()),
    }


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("place", ["from_the_start", "after_the_resume"])
def test_order_boxes_and_masks_are_those_of_then(
    written: Path, expected: dict[str, Any], container: str, place: str
):
    config = parse_run(expected["words"])
    with Loader(
        open_dataset(str(written / container)),
        choose_objective(config).sampling(),
        config.order,
        config.loader,
        seed=config.train.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        device=torch.device("cpu"),
    ) as loader:
        if place == "after_the_resume":
            state = written / "run" / "checkpoints" / "step-000004" / "state.json"
            loader.load_state_dict(json.loads(state.read_text())["client"]["loader"])
        batches = iter(loader)
        for then in expected[place]:
            now = describe(next(batches))
            # Pixels are rounded by kernels that differ with the processor; all else is exact.
            assert now.pop("pixel_mean") == pytest.approx(then["pixel_mean"], abs=2e-3)
            assert now == {
                name: value for name, value in then.items() if name != "pixel_mean"
            }


def test_a_run_is_resumed_with_the_losses_of_then(
    written: Path, expected: dict[str, Any], tmp_path: Path
):
    """One process, for torch is imported once: both formats resumed, and one run from the start."""
    runs = {"webdataset": "webdataset", "beton": "beton", "fresh": "webdataset"}
    lines = []
    for name, container in runs.items():
        run_dir = tmp_path / name
        if name != "fresh":
            shutil.copytree(written / "run", run_dir)
        changed = ["--data.train", str(written / container), "--run.dir", str(run_dir)]
        lines.append([*expected["words"], *changed])
    code = """
import json, sys
from train.pretrain import run
from train.settings.command_line import parse_run
sys.exit(max(run(parse_run(words)) for words in json.loads(sys.argv[1])))
"""
    done = launch.run(["-c", code, json.dumps(lines)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("resumed from step 4 (images_seen 16)") == 2, done.stdout
    then = {int(step): loss for step, loss in expected["losses"].items()}
    for name in runs:
        now = {line["step"]: line["loss"] for line in read_metrics(tmp_path / name)}
        assert now == pytest.approx(then, rel=ROUNDING), name
        assert read_status(tmp_path / name)["state"] == "done"
