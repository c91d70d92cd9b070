"""Large files appear whole in their place, or leave no trace."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import InfrastructureError
from pipeline.images.refused import Reason, Refused, RefusedError, refused_by
from pipeline.storage.unfinished import UnfinishedFile


@pytest.fixture(params=["local", "memory"])
def uri(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if request.param == "local":
        return str(tmp_path / "out" / "a.tar")
    return f"memory://unfinished-{tmp_path.name}/a.tar"


def traces(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_a_file_appears_when_it_is_committed_and_not_before(
    uri: str, tmp_path: Path
) -> None:
    with UnfinishedFile(uri) as unfinished:
        unfinished.write(b"one ")
        unfinished.write(b"two")
        assert not storage.exists(uri)
        unfinished.commit()
    assert storage.read_bytes(uri) == b"one two"
    assert traces(tmp_path) == (["a.tar"] if storage.is_local(uri) else [])


def test_a_file_that_is_not_committed_leaves_no_trace(uri: str, tmp_path: Path) -> None:
    with UnfinishedFile(uri) as unfinished:
        unfinished.write(b"half")
        assert len(traces(tmp_path)) == 1
    assert not storage.exists(uri)
    assert traces(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InfrastructureError, match=r"cannot write .*file/a\.tar"),
        UnfinishedFile(str(tmp_path / "file" / "a.tar")),
    ):
        pass


def test_every_exception_of_a_decoder_has_a_reason() -> None:
    ours = Refused(Reason.SIZE_DIFFERS, "5 x 4 pixels")
    assert refused_by(RefusedError(ours)) is ours
    assert refused_by(ValueError("bad code")) == Refused(Reason.UNDECODABLE, "bad code")
    assert str(ours) == "not of the declared size: 5 x 4 pixels"
    assert str(Refused(Reason.EMPTY)) == "empty"
