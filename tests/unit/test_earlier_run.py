"""What an earlier run has left in a run's folder is renamed, never overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.report.earlier_run import add_to_history, keep_earlier_run, read_history

FILES = (
    "metrics.jsonl",
    "config.toml",
    "ds_config.json",
    "summary.json",
    "loss.png",
    "reconstruction.png",
    "data_report.json",
    "data_report-rank-0.json",
    "nonfinite-step-000003-at-0-24-rank-1.json",
    "stacks-rank-00000.txt",
    "trackers.json",
    "tensorboard/events.out",
)
STAYS = (
    "status.json",
    "lease.json",
    "history.jsonl",
    "notes.txt",
    "checkpoints/step-000001/x",
)


def fill(folder: Path, text: str) -> None:
    for name in FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": 8, "of": text})
        path.write_text(line + "\n" if name == "metrics.jsonl" else text)


def keep(folder: Path, **changes: Any) -> list[str]:
    asked = {"run_id": "new", "step": 0, "settings": "x", "checkpoint_dir": ""}
    return keep_earlier_run(folder, **{**asked, **changes})


def test_each_run_that_begins_here_leaves_the_earlier_ones_whole(
    tmp_path: Path,
) -> None:
    for name in STAYS:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("kept" if name != "history.jsonl" else "")
    for number, text in enumerate(("first", "second", "third"), start=1):
        fill(tmp_path, text)
        kept = keep(tmp_path)
        assert len(kept) == len(FILES)
        assert f"metrics-{number}.jsonl" in kept
        assert (tmp_path / f"tensorboard-{number}/events.out").read_text() == text
        assert not any((tmp_path / name).exists() for name in FILES)
    for number, text in enumerate(("first", "second", "third"), start=1):
        assert text in (tmp_path / f"metrics-{number}.jsonl").read_text()
        assert (tmp_path / f"config-{number}.toml").read_text() == text
        name = f"nonfinite-step-000003-at-0-24-rank-1-{number}.json"
        assert (tmp_path / name).read_text() == text
    assert all((tmp_path / name).exists() for name in STAYS)


def test_a_name_that_is_taken_is_passed_over_for_all_files(tmp_path: Path) -> None:
    fill(tmp_path, "mine")
    (tmp_path / "config-1.toml").write_text("somebody's")
    assert "metrics-2.jsonl" in keep(tmp_path)
    assert (tmp_path / "config-1.toml").read_text() == "somebody's"


def test_the_same_run_goes_on_in_its_files(tmp_path: Path) -> None:
    fill(tmp_path, "mine")
    add_to_history(tmp_path, {"run": "mine", "checkpoint_dir": ""})
    assert keep(tmp_path, run_id="mine", step=4, settings="other") == []
    assert keep(tmp_path, run_id="other", step=4) != []


def test_a_branch_from_a_copied_checkpoint_keeps_the_lines_of_the_other_branch(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "mine")
    add_to_history(tmp_path, {"run": "mine", "checkpoint_dir": ""})
    # Its own folder was moved; no line would be cut.
    assert keep(tmp_path, run_id="mine", step=8, checkpoint_dir="moved") == []
    assert keep(tmp_path, run_id="mine", step=4, checkpoint_dir="copy") != []


def test_a_folder_of_the_first_version_is_adopted_with_its_checkpoints(
    tmp_path: Path,
) -> None:
    fill(tmp_path, "mine")
    (tmp_path / "config.toml").write_text('[checkpoint]\ndir = "s3://b/one"\n')
    assert keep(tmp_path, run_id="mine", step=8, checkpoint_dir="s3://b/one") == []
    assert keep(tmp_path, run_id="mine", step=8, checkpoint_dir="s3://b/two") != []


def test_a_start_that_took_no_step_is_no_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("x")
    (tmp_path / "metrics.jsonl").touch()
    assert keep(tmp_path, settings="x") == []
    assert "config-1.toml" in keep(tmp_path, settings="y")


def test_history_grows_also_behind_half_a_line(tmp_path: Path) -> None:
    add_to_history(tmp_path, {"run": "a"})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"run": "b"')
    add_to_history(tmp_path, {"run": "c"})
    assert [start["run"] for start in read_history(tmp_path)] == ["a", "c"]
