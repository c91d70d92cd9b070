"""What a run cannot start from is said once, before anything is trained, with the exit code of its
kind."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.train_runs import losses, start, words_of
from tests.launch import Started, environment
from train.process.lease import RunLease
from train.process.liveness import judge_status
from train.process.outcome import Outcome, read_status

pytestmark = pytest.mark.slow

SETTINGS = {"train.steps": "4", "optim.warmup-steps": "1"}


def check_refused(
    done: subprocess.CompletedProcess[str], *, code: int, says: list[str]
) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for text in says:
        assert text in done.stderr


def test_too_few_images_for_a_batch(make_dataset: Callable[..., str], tmp_path: Path):
    done = start(
        tmp_path,
        {},
        data=make_dataset((5, 4)),
        ranks=1,
        settings={**SETTINGS, "order.remainder": "drop"},
    )
    check_refused(done, code=2, says=["9 samples", "12"])
    assert not losses(tmp_path / "run")


@pytest.mark.remote
def test_a_bucket_for_checkpoints_that_is_not_there(
    make_dataset: Callable[..., str], s3_bucket: str, tmp_path: Path
):
    where = f"{s3_bucket}-nowhere/checkpoints"
    done = start(
        tmp_path,
        {},
        data=make_dataset(),
        ranks=1,
        settings={**SETTINGS, "checkpoint.dir": where},
    )
    check_refused(done, code=4, says=[where, "not found"])
    assert not losses(tmp_path / "run"), "it trained what it could not have saved"


def test_a_folder_for_checkpoints_that_cannot_be_made(
    make_dataset: Callable[..., str], tmp_path: Path
):
    (tmp_path / "file").write_text("in the way")
    where = str(tmp_path / "file" / "checkpoints")
    settings = {**SETTINGS, "checkpoint.dir": where}
    done = start(tmp_path, {}, data=make_dataset(), ranks=1, settings=settings)
    check_refused(done, code=4, says=[where, "cannot be used"])
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    assert not losses(tmp_path / "run"), "it trained what it could not have saved"


def test_a_folder_in_use_and_a_checkpoint_of_another_model(
    make_dataset: Callable[..., str], tmp_path: Path
):
    data, run_dir = make_dataset(), tmp_path / "run"
    with RunLease(run_dir):
        refused = start(tmp_path, {}, data=data, ranks=1, settings=SETTINGS)
        check_refused(refused, code=2, says=["works here"])
        assert not read_status(run_dir), (
            "the refused start wrote the status of the one that runs"
        )
    done = start(tmp_path, {}, data=data, ranks=1, settings=SETTINGS)
    assert done.returncode == 0, done.stderr
    assert judge_status(read_status(run_dir)) == "ended"
    other = start(
        tmp_path,
        {},
        data=data,
        ranks=1,
        settings={**SETTINGS, "train.steps": "8", "model.depth": "3"},
    )
    check_refused(
        other, code=4, says=["blocks.2.norm1.weight", "missing", "another model"]
    )
    assert list(losses(run_dir)) == [1, 2, 3, 4]


def test_a_second_start_on_the_port_and_in_the_folder_of_a_running_run(
    make_dataset: Callable[..., str], tmp_path: Path
):
    """The folder is looked at first: a port that is taken would look like a failed run."""
    run_dir = tmp_path / "run"
    first = Outcome(run_dir)
    words = words_of(tmp_path, {}, data=make_dataset(), settings=SETTINGS)
    with RunLease(run_dir, launch=first.launch), socket.socket() as busy:
        first.write("running", exit_code=None)
        before = read_status(run_dir)
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(busy.getsockname()[1]),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
        }
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        with Started(
            words, [{**environment(), **meeting, **place} for place in places]
        ) as second:
            second.wait()
            assert second.codes[0] == 2, second.stderr
            assert "works here" in second.stderr
            assert "Traceback" not in second.stderr
        assert read_status(run_dir) == before
        assert judge_status(before) == "running"
