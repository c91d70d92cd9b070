"""What a run was trained on and what was bad about it: kept beside its checkpoints and in its
folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.dataset.info import DatasetInfo, parse_dataset_info
from pipeline.errors import DataError, InfrastructureError
from pipeline.loader.data_report import DataReport, merge_reports
from train.process.world import World

log = logging.getLogger(__name__)
DATA_REPORT_FILE = "data_report.json"


def keep_description(checkpoint_dir: str, info: DatasetInfo) -> None:
    """Keep a copy of `dataset.json` beside the checkpoints, so that a resume can name the shards
    that changed.

    Args:
        checkpoint_dir: URI of the folder of checkpoints.
        info: the training dataset.
    """
    # Named by its fingerprint: each dataset that a run was trained on keeps its own.
    uri = _description_uri(checkpoint_dir, info.fingerprint)
    if not storage.exists(uri):
        storage.put_if_absent(uri, info.to_json())


def kept_description(checkpoint_dir: str, fingerprint: str) -> DatasetInfo | None:
    """Return the dataset that a run was trained on, or None if no readable copy was kept."""
    uri = _description_uri(checkpoint_dir, fingerprint)
    where = f"checkpoint: {storage.redact(uri)}"
    try:
        return parse_dataset_info(storage.read_bytes(uri), where=where)
    except DataError:
        # It only makes a message better: without it a resume names no shards.
        return None


def collect_data_report(
    report: DataReport,
    *,
    run_dir: Path,
    world: World,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge the ranks' reports into data_report.json. All ranks call it together.

    Args:
        report: this rank's.
        run_dir: folder of the run.
        world: the processes of the run.
        earlier: the merged report up to the checkpoint that was resumed from.

    Returns:
        The merged report, for the next checkpoint.
    """
    reports = world.gather(report.to_json())
    # The loader counts from this start on; the checkpoint has the rest.
    if earlier:
        reports.insert(0, earlier)
    merged = merge_reports(reports)
    if world.is_main and merged["num_bad"]:
        text = json.dumps(merged, indent=1, ensure_ascii=False) + "\n"
        # The report is in the checkpoint too: a full disk here must not end the run.
        try:
            storage.write_atomic(str(run_dir / DATA_REPORT_FILE), text.encode())
        except InfrastructureError as error:
            log.warning("%s could not be written: %s", DATA_REPORT_FILE, error)
    return merged


def leave_data_report(
    report: DataReport,
    *,
    run_dir: Path,
    rank: int,
) -> None:
    """Write this rank's report alone, when a run ends early and the ranks do not meet any more."""
    if report.num_bad:
        report.write(str(run_dir / f"data_report-rank-{rank}.json"))


def _description_uri(checkpoint_dir: str, fingerprint: str) -> str:
    return storage.join(checkpoint_dir, f"dataset-{fingerprint[:16]}.json")
