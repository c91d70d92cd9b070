"""Damaged and hostile archives, as a user meets them: through `pipeline.verify` and at the start of
a run."""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.dataset import open_dataset
from pipeline.errors import ConfigError, DataError
from pipeline.verify import verify

REPOSITORY = Path(__file__).resolve().parents[2]
BLOCK = 512


def write_members(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_foreign_tar_cut_at_any_block_is_named_and_never_half_read(crops, tmp_path):
    path = write_members(
        tmp_path / "data" / "x-000000.tar", [(f"{n}.jpg", crops[n]) for n in range(3)]
    )
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        end = max(
            member.offset_data + -(-member.size // BLOCK) * BLOCK for member in archive
        )
    for cut in range(BLOCK, end, BLOCK):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"x-000000\.tar"):
            open_dataset(str(path.parent), cache_dir=tmp_path / "cache")
        [problem] = verify(str(path.parent)).problems
        assert problem.shard == "x-000000.tar"


@pytest.mark.parametrize("cut", [BLOCK, 3 * BLOCK + 7, -1])
def test_a_shard_of_a_dataset_that_was_cut_is_a_problem_of_verify(make_dataset, cut):
    folder = Path(make_dataset())
    shard = folder / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:cut])
    for full in (False, True):
        assert "train-000001.tar" in {
            problem.shard for problem in verify(str(folder), full=full).problems
        }


@pytest.mark.parametrize("place", ["header", "image"])
def test_a_flipped_bit_anywhere_is_found_by_the_full_check(make_dataset, place):
    folder = Path(make_dataset())
    dataset = open_dataset(str(folder))
    offset = int(dataset.lookup(np.array([15])).offsets_B[0])
    shard = folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[offset - BLOCK + 5 if place == "header" else offset + 200] ^= 4
    shard.write_bytes(bytes(data))
    assert "train-000001.tar" in {
        problem.shard for problem in verify(str(folder), full=True).problems
    }


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.jpg", "a.jpg"], "a"),
        (["a.jpg", "b.jpg", "a.cls"], "a"),
        (["a.cls"], "a"),
    ],
    ids=["twice", "not adjacent", "no image"],
)
def test_badly_grouped_members_are_a_problem_that_names_the_key(
    crops, tmp_path, names, says
):
    members = [(name, b"1" if name.endswith("cls") else crops[0]) for name in names]
    path = write_members(tmp_path / "data" / "x-000000.tar", members)
    [problem] = verify(str(path.parent)).problems
    assert re.search(rf"\b{says}\b", problem.problem + problem.key)


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pyd", "pth", "pt"])
def test_a_pickled_member_is_never_loaded(crops, tmp_path, suffix):
    canary = tmp_path / "canary"
    members = [("a.jpg", crops[0]), (f"a.{suffix}", pickle.dumps(_Canary(canary)))]
    path = write_members(tmp_path / "data" / "x-000000.tar", members)
    assert (
        open_dataset(str(path.parent), cache_dir=tmp_path / "cache").info.num_samples
        == 1
    )
    verify(str(path.parent), full=True)
    assert not canary.exists()
    pickle.loads(members[1][1])  # the canary does sing where it is let
    assert canary.exists()


@pytest.mark.parametrize(
    "name", ["../escape.jpg", "/absolute.jpg", "a/../../escape.jpg"]
)
def test_names_that_lead_out_of_the_archive_are_refused(crops, tmp_path, name):
    path = write_members(tmp_path / "data" / "x-000000.tar", [(name, crops[0])])
    with pytest.raises(DataError, match=r"x-000000\.tar"):
        open_dataset(str(path.parent), cache_dir=tmp_path / "cache")


def test_a_pipe_is_no_address(tmp_path):
    with pytest.raises(ConfigError, match="pipe:"):
        open_dataset(f"pipe:touch {tmp_path}/canary")
    assert not (tmp_path / "canary").exists()


def test_nothing_here_unpickles():
    """A hostile .pt can do nothing where nothing loads one; a loader that is added must take
    tensors alone."""
    for room in ("pipeline", "model", "train", "deploy"):
        for file in (REPOSITORY / room).rglob("*.py"):
            text = file.read_text()
            assert not re.search(
                r"^\s*(import|from) (pickle|dill|cloudpickle|joblib)\b",
                text,
                re.MULTILINE,
            ), file
            for call in re.findall(r"torch\.load\(([^)]*)\)", text):
                if "safetensors.torch.load(" not in text:
                    assert "weights_only=True" in call, file
