"""Large files that are written piece by piece and seen by nobody until they are whole."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from pipeline.storage.door import is_local, local_path
from pipeline.storage.local import commit_file, tmp_path
from pipeline.storage.retry import explain
from pipeline.storage.uri import name_of
from pipeline.storage.writes import put_file


class UnfinishedFile:
    """A file on this machine's disk that `commit` puts in its place, whole.

    Use it as a context manager: leaving it removes the temporary file, if it was not committed.
    `write_atomic` is for content that is in memory anyway; this is for what is too large for that.

    Args:
        uri: Where the finished file goes. A local one is written beside its place, because a rename
            is atomic only inside one file system; one for object storage goes to `TMPDIR`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> UnfinishedFile:
        try:
            if is_local(self._uri):
                target = local_path(self._uri)
                target.parent.mkdir(parents=True, exist_ok=True)
                self._path = tmp_path(target)
            else:
                folder = Path(tempfile.gettempdir())
                self._path = tmp_path(folder / f"maelstrom-{name_of(self._uri)}")
            # Readable too: a writer that learns the layout last reads its own pieces back.
            self._file = self._path.open("x+b")
        except OSError as error:
            raise explain("write", self._uri, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Whatever goes wrong here must not hide the error that led here.
        with suppress(OSError):
            if self._file is not None:
                self._file.close()
        with suppress(OSError):
            if self._path is not None:
                self._path.unlink(missing_ok=True)

    @property
    def file(self) -> BinaryIO:
        """Return the open file."""
        if self._file is None:
            raise RuntimeError("the writer is used outside its with block")
        return self._file

    def write(self, data: bytes) -> None:
        """Append bytes.

        Raises:
            InfrastructureError: The disk is full or not writable.
        """
        try:
            self.file.write(data)
        except OSError as error:
            raise explain("write", self._uri, error) from error

    def commit(self) -> None:
        """Put the file in its place: flushed and renamed, or uploaded.

        Raises:
            InfrastructureError: The disk is full or not writable, or the upload failed.
        """
        try:
            # What the buffer still holds may be what the disk has no room for.
            self.file.close()
            assert self._path is not None
            if is_local(self._uri):
                commit_file(self._path, local_path(self._uri))
            else:
                put_file(self._path, self._uri)
        except OSError as error:
            raise explain("write", self._uri, error) from error
