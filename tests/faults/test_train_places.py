"""Where `train.export` and `train.reconstruct` are told to write: a file, a folder, a full disk, a
read-only one. One line, the promised code, and no unfinished file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from model.config import ModelConfig
from model.objectives.mae import MaskedAutoencoder
from tests.faults.test_train_full_disk import CAN_MOUNT
from tests.launch import REPOSITORY, environment
from tests.limits import HANG_S
from train.checkpoint.store import CheckpointStore
from train.config import RunConfig
from train.engine.build import build_engine
from train.process.world import World

pytestmark = pytest.mark.slow

SMALL = ModelConfig(
    image_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    decoder_embed_dim=16,
    decoder_depth=1,
    decoder_num_heads=2,
)
PAGE_BYTES = 4096
DISK_BYTES = 1 << 20


@dataclass
class Case:
    """A command and how it must end."""

    module: str
    words: list[str]
    out: Path
    code: int
    says: list[str] = field(default_factory=list)
    """What its one message must hold; empty if it succeeds."""
    left: list[str] = field(default_factory=list)
    """Files and folders that are in `out` afterwards."""
    more: dict[str, Any] = field(default_factory=dict)
    """What is done to the disk first."""


def run_cases(cases: list[Case], tmp_path: Path, *, before: str = "") -> None:
    """Run all cases from one process that imports torch, and check each of them."""
    listed = tmp_path / "cases.json"
    plans = [
        {
            "module": case.module,
            "words": [*case.words, "--out", str(case.out)],
            "look": str(case.out.parent if case.out.suffix else case.out),
            **case.more,
        }
        for case in cases
    ]
    listed.write_text(json.dumps(plans))
    worker = Path(__file__).with_name("train_places_worker.py")
    command = [sys.executable, str(worker), str(listed)]
    if before:
        command = [
            "unshare",
            "--mount",
            "sh",
            "-c",
            f'{before}; exec "$@"',
            "sh",
            *command,
        ]
    done = subprocess.run(
        command,
        env=environment() | {"PYTHONPATH": str(REPOSITORY), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        check(case, json.loads(line))


def check(case: Case, ended: dict[str, Any]) -> None:
    said = f"{case}\n{ended['said']}"
    assert ended["code"] == case.code, said
    assert "Traceback" not in said
    errors = [line for line in ended["said"].splitlines() if line.startswith("error: ")]
    assert len(errors) == (case.code != 0), said
    for text in case.says:
        assert text in ended["said"], said
    folder = case.out.parent if case.out.suffix else case.out
    found = [str(Path(path).relative_to(folder)) for path in ended["left"]]
    assert found == sorted(case.left), said


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's folder with one checkpoint."""
    torch.manual_seed(0)
    settings = {
        **RunConfig(model=SMALL).model_dump(),
        "engine": {"kind": "torch", "precision": "fp32"},
        "train": {"steps": 1, "global_batch_size": 2, "micro_batch_size": 2},
        "view": {"height": 32, "width": 32},
    }
    config = RunConfig.model_validate(settings)
    model = MaskedAutoencoder(SMALL)
    built = build_engine(config, model=model, resume=None, world=World())
    run_dir = tmp_path_factory.mktemp("run")
    store = CheckpointStore(str(run_dir / "checkpoints"), keep_last=1)
    store.save(1, built, {}, world=World())
    return str(run_dir)


@pytest.fixture
def drawing(tmp_path: Path, checkpoint: str) -> Callable[..., Case]:
    """Make a case of `train.reconstruct`, which draws one picture."""
    picture = tmp_path / "picture.png"
    Image.effect_noise((64, 64), 90).save(picture)
    words = [checkpoint, "--images", str(picture)]
    return lambda out, **expected: Case("train.reconstruct", words, out, **expected)


@pytest.fixture
def export(checkpoint: str) -> Callable[..., Case]:
    """Make a case of `train.export`."""

    def make(out: Path, *words: str, **expected: Any) -> Case:
        return Case(
            "train.export", [checkpoint, *(words or ("--to", "timm"))], out, **expected
        )

    return make


def test_files_and_folders_in_the_way(
    tmp_path: Path, export: Callable[..., Case], drawing: Callable[..., Case]
) -> None:
    file, folder = tmp_path / "there" / "file", tmp_path / "taken" / "x.png"
    file.parent.mkdir()
    file.write_text("kept")
    folder.mkdir(parents=True)
    (tmp_path / "weights" / "timm.safetensors").mkdir(parents=True)
    (tmp_path / "settings" / "config.json").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    wanted = "is a file, and a folder is needed there"
    run_cases(
        [
            export(file, code=2, says=["--out", str(file), wanted]),
            export(file / "a" / "b", code=2, says=["--out", str(file), wanted]),
            export(
                tmp_path / "link",
                code=2,
                says=["--out", str(tmp_path / "link"), wanted],
            ),
            export(tmp_path / "new" / "a", code=0, left=["timm.safetensors"]),
            export(
                tmp_path / "weights",
                code=76,
                says=["--out", "timm.safetensors", "is a folder"],
                left=["timm.safetensors"],
            ),
            export(
                tmp_path / "settings",
                *("--to", "hf"),
                code=76,
                says=["--out", "config.json", "is a folder"],
                left=["config.json", "model.safetensors"],
            ),
            drawing(
                folder,
                code=2,
                says=["--out", str(folder), "is a folder, and a file is to be written"],
                left=["x.png"],
            ),
            drawing(file / "x.png", code=2, says=["--out", str(file), wanted]),
            drawing(tmp_path / "new" / "b" / "x.png", code=0, left=["x.png"]),
        ],
        tmp_path,
    )
    assert file.read_text() == "kept"


@pytest.mark.skipif(not CAN_MOUNT, reason="needs to mount a file system")
def test_disks_that_are_full_fill_up_or_are_read_only(
    tmp_path: Path, export: Callable[..., Case], drawing: Callable[..., Case]
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mae = ("--to", "mae", "--file-type", "pth")
    hf = ("--to", "hf")
    # How much each command writes is seen where there is room.
    run_cases(
        [
            export(
                tmp_path / "room" / "hf",
                *hf,
                code=0,
                left=["config.json", "model.safetensors"],
            ),
            drawing(tmp_path / "room" / "png" / "x.png", code=0, left=["x.png"]),
        ],
        tmp_path,
    )
    weights = (tmp_path / "room" / "hf" / "model.safetensors").stat().st_size
    pages = -(-weights // PAGE_BYTES)
    full = ["--out", str(disk), "the disk is full. Free some space"]
    some: dict[str, Any] = {"disk": str(disk), "room": 2 * PAGE_BYTES}
    none = some | {"room": 0}
    all_but_settings = some | {"room": pages * PAGE_BYTES}
    locked = {"disk": str(disk), "read_only": True}
    read_only = ["--out", str(disk), "the file system is read-only"]
    cases = [
        *(
            export(disk / "full", *to, code=76, says=full, more=none)
            for to in (hf, mae)
        ),
        drawing(disk / "full" / "x.png", code=76, says=full, more=none),
        # The place is tried with one page: what follows does not fit.
        *(
            export(disk / "most", *to, code=76, says=full, more=some)
            for to in (hf, mae)
        ),
        drawing(disk / "most" / "x.png", code=76, says=full, more=some),
        export(
            disk / "last",
            *hf,
            code=76,
            says=[*full, "config.json"],
            left=["model.safetensors"],
            more=all_but_settings,
        ),
        export(disk / "locked", code=76, says=read_only, more=locked),
        drawing(disk / "locked" / "x.png", code=76, says=read_only, more=locked),
    ]
    run_cases(
        cases, tmp_path, before=f"mount -t tmpfs -o size={DISK_BYTES} tmpfs {disk}"
    )
