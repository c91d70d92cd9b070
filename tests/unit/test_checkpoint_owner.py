"""A folder of checkpoints has one owner, on disk and in object storage, also after crashes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import torch

from pipeline import storage
from pipeline.errors import ConfigError
from tests.limits import wait_until
from train.checkpoint import owner as owners
from train.checkpoint.files import committed_steps
from train.checkpoint.owner import CheckpointOwner
from train.checkpoint.store import CheckpointLostError, CheckpointStore
from train.config import RunConfig
from train.engine.named_state import WEIGHT, ExportedState, HostCopy, NamedTensor
from train.errors import CheckpointError
from train.process.world import World

BEAT_S = 0.02


@pytest.fixture(
    params=["disk", pytest.param("s3", marks=[pytest.mark.remote, pytest.mark.slow])]
)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "disk":
        yield str(tmp_path / "checkpoints")
    else:
        yield f"{request.getfixturevalue('s3_bucket')}/checkpoints"


def job(
    folder: str, run_dir: str = "/runs/a", *, stale_s: float = 0.2
) -> CheckpointOwner:
    said: list[str] = []
    made = CheckpointOwner(
        folder,
        run_dir=Path(run_dir),
        world=World(),
        beat_s=BEAT_S,
        stale_s=stale_s,
        say=said.append,
    )
    made.said = said  # type: ignore[attr-defined]
    return made


def records(folder: str) -> list[str]:
    return sorted(
        file.name
        for file in storage.list_files(folder)
        if file.name.startswith("owner-")
    )


def write_record(folder: str, number: int, **changes: object) -> None:
    own = job(folder)._own
    content = {**asdict(own), "token": "other"}
    content["run_dir"] = changes.pop("run_dir", own.run_dir)
    content["process"] |= changes
    uri = storage.join(folder, f"owner-{number:06d}.json")
    storage.write_atomic(uri, json.dumps(content).encode())


def test_a_second_job_is_refused_by_name_until_the_first_has_ended(folder: str) -> None:
    with job(folder, "/runs/first") as first:
        first.take()
        with (
            pytest.raises(ConfigError) as caught,
            job(folder, "/runs/second") as second,
        ):
            second.take()
        assert not second.said, (
            "its process can be looked up: there is no reason to wait"
        )  # type: ignore[attr-defined]
        text = str(caught.value)
        assert f"process {psutil.Process().pid} on " in text
        assert "run.dir /runs/first" in text
        assert "give another checkpoint.dir" in text
        assert first.problem() is None
    with job(folder) as third:
        third.take()
        assert records(folder) == ["owner-000002.json"]


def test_of_many_jobs_that_start_together_one_owns_the_folder(folder: str) -> None:
    storage.make_folder(folder)
    jobs = [job(folder, f"/runs/{number}") for number in range(6)]
    ended: list[CheckpointOwner | None] = []
    gate = threading.Barrier(len(jobs))

    def start(one: CheckpointOwner) -> None:
        gate.wait()
        try:
            one.take()
            ended.append(one)
        except ConfigError:
            ended.append(None)

    threads = [threading.Thread(target=start, args=(one,)) for one in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = [one for one in ended if one is not None]
    assert (len(ended), len(taken)) == (6, 1)
    taken[0].__exit__(None, None, None)


def test_an_owner_that_was_killed_here_is_replaced_at_once(folder: str) -> None:
    write_record(folder, 4, started_s=psutil.Process().create_time() - 1000)
    with job(folder) as after:
        after.take()
        assert not after.said  # type: ignore[attr-defined]
        assert records(folder) == ["owner-000005.json"]


def test_an_owner_elsewhere_is_replaced_once_it_is_silent(folder: str) -> None:
    write_record(folder, 1, host="elsewhere")
    with job(folder) as after:
        after.take()
        said = after.said  # type: ignore[attr-defined]
        assert len(said) == 1
        assert "elsewhere" in said[0]


def test_an_owner_elsewhere_that_gives_signs_of_life_is_left_alone(folder: str) -> None:
    first = job(folder)
    first._own = replace(
        first._own, process=replace(first._own.process, host="elsewhere")
    )
    with first:
        first.take()
        with (
            pytest.raises(ConfigError, match="on elsewhere"),
            job(folder, stale_s=60) as second,
        ):
            second.take()
        assert first.problem() is None


def test_an_owner_that_was_replaced_knows_and_writes_no_more(folder: str) -> None:
    with job(folder, "/runs/paused") as paused:
        paused.take()
        write_record(folder, 2, run_dir="/runs/after")
        assert "/runs/after" in (paused.problem() or "")
        wait_until(
            lambda: paused._thread is not None and not paused._thread.is_alive(),
            what="the end of its beat",
        )
    assert json.loads(storage.read_bytes(storage.join(folder, "owner-000002.json")))[
        "state"
    ] == ("holds"), "the one that was replaced released the folder of the other"


def test_a_damaged_record_is_waited_for_and_then_replaced(folder: str) -> None:
    storage.write_atomic(storage.join(folder, "owner-000003.json"), b"{")
    with job(folder) as after:
        after.take()
        assert records(folder) == ["owner-000004.json"]


def test_a_folder_that_cannot_be_made_is_a_matter_of_checkpoints(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match="cannot be used"),
        job(str(tmp_path / "file/x")) as a,
    ):
        a.take()


def test_a_sign_of_life_changes_the_record(folder: str) -> None:
    with job(folder) as own:
        own.take()
        uri = storage.join(folder, "owner-000001.json")
        wait_until(
            lambda: json.loads(storage.read_bytes(uri))["beat"] >= 2,
            what="two signs of life",
        )
    assert json.loads(storage.read_bytes(uri))["state"] == "released"
    assert owners.STALE_S >= 4 * owners.BEAT_S


class Exporter:
    """A model of one number."""

    config = RunConfig()
    table: ClassVar = [NamedTensor("weight", (1,), trained=False)]
    device = torch.device("cpu")

    def export_state(self, copy: HostCopy) -> ExportedState:
        return ExportedState(
            {"weight": {WEIGHT: copy("weight", WEIGHT, torch.ones(1))}}
        )


@pytest.mark.parametrize("moment", ["before", "written"])
def test_a_job_that_was_replaced_neither_commits_nor_removes(
    folder: str, moment: str
) -> None:
    with job(folder) as own:
        own.take()
        world = World()
        store = CheckpointStore(folder, keep_last=1, owner=own)
        for step in (1, 2):
            store.save(step, Exporter(), {}, world=world)
        assert committed_steps(folder) == [2]

        def replace_owner(phase: str) -> None:
            if phase == "written":
                # The other job is at the same step.
                write_record(folder, 2)
                storage.write_atomic(
                    storage.join(folder, "step-000003/state.json"), b"theirs"
                )

        if moment == "before":
            write_record(folder, 2)
            late = store
        else:
            late = CheckpointStore(
                folder, keep_last=1, owner=own, on_phase=replace_owner
            )
        with pytest.raises(CheckpointLostError, match="was taken over by process"):
            late.save(3, Exporter(), {}, world=world)
        assert committed_steps(folder) == [2]
        files = {file.name for file in storage.list_files(folder, recursive=True)}
        assert ("step-000003/state.json" in files) == (moment == "written")
