"""The only door to local disks and object storage: URIs, ranged reads, retries, atomic writes,
redaction.

Local paths never pass through fsspec. Remote file systems are asked for anew at every call, never
kept: fsspec drops its instances after a fork, so nothing here holds a connection that a child
process would share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import ConfigError, DataError
from pipeline.storage.local import FileInfo, OnOther, ignore_others, list_local
from pipeline.storage.retry import explain, is_transient, with_retries
from pipeline.storage.uri import SCHEME, expand_home, redact, split_scheme

T = TypeVar("T")
_EXTRAS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "https": ("aiohttp", "s3"),
}


def is_local(uri: str) -> bool:
    """Return whether the URI is a path of this machine's file system."""
    return split_scheme(uri)[0] in ("", "file")


def local_path(uri: str) -> Path:
    """Return the URI as a local path.

    Raises:
        ConfigError: It is not local.
    """
    scheme, path = split_scheme(uri)
    if scheme not in ("", "file"):
        raise ConfigError(
            f"storage: {redact(uri)!r} is not a local path, and one is needed here."
        )
    return Path(expand_home(path))


def file_system(scheme: str, use: Literal["read", "any"] = "any") -> Any:
    """Return fsspec's file system for a scheme, configured from the environment alone.

    Args:
        scheme: Of the URI.
        use: `read` leaves retries to the caller, who counts them; uploads in parts are better
            retried part by part.
    """
    import fsspec

    options: dict[str, Any] = {}
    if scheme in ("s3", "gs", "az"):
        options["use_listings_cache"] = False  # another process may have written since
    if scheme == "s3":
        # fsspec keeps instances by their arguments: named here, another endpoint is another
        # instance.
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get(
            "AWS_ENDPOINT_URL"
        )
        if (
            endpoint
            and os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower()
            != "true"
        ):
            options["endpoint_url"] = endpoint
        # A hung socket must end inside the retry budget.
        options["config_kwargs"] = {"connect_timeout": 10, "read_timeout": 60}
        if use == "read":
            options["config_kwargs"]["retries"] = {"total_max_attempts": 1}
    # An extra that is missing shows only here: fsspec imports a scheme's package when it is asked.
    try:
        fs = fsspec.filesystem(scheme, **options)
        if scheme == "s3" and use == "read":
            fs.retries = 1
        return fs
    except ImportError as error:
        package, extra = _EXTRAS.get(scheme, (scheme, scheme))
        raise ConfigError(
            f"storage: {scheme}:// needs the package {package}, which is not installed. "
            f"Install it with: pip install -e '.[{extra}]' -c constraints.txt"
        ) from error


def in_store(action: str, uri: str, call: Callable[[Any], T]) -> T:
    """Run one call against a remote file system, retrying what may pass by itself."""
    scheme = split_scheme(uri)[0]
    if scheme == "https" and action not in ("read", "look up"):
        raise ConfigError(
            f"storage: cannot {action} {redact(uri)}: https:// is read only. Use s3://, gs://, "
            "az:// or a path."
        )
    return with_retries(action, uri, lambda: call(file_system(scheme)))


def on_disk(action: str, uri: str, call: Callable[[Path], T]) -> T:
    """Run one call against a local path, and explain its failure."""
    try:
        return call(local_path(uri))
    except OSError as error:
        raise explain(action, uri, error) from error


def _info_of(uri: str) -> dict[str, Any] | None:
    uri = split_scheme(uri)[1]

    def info(fs: Any) -> dict[str, Any] | None:
        try:
            return dict(fs.info(uri))
        except FileNotFoundError as error:
            if is_transient(error):
                raise
            return None

    return in_store("look up", uri, info)


def exists(uri: str) -> bool:
    """Return whether a file or folder is there."""
    if is_local(uri):
        return on_disk("look up", uri, lambda path: path.exists())
    return _info_of(uri) is not None


def is_folder(uri: str) -> bool:
    """Return whether a URI is a folder (in object storage: a prefix with something below it)."""
    if is_local(uri):
        return on_disk("look up", uri, lambda path: path.is_dir())
    info = _info_of(uri)
    return info is not None and info.get("type") == "directory"


def size_of(uri: str) -> int:
    """Return a file's size in bytes.

    Raises:
        DataError: There is no such file.
    """
    if is_local(uri):
        return on_disk("look up", uri, lambda path: path.stat().st_size)
    info = _info_of(uri)
    if info is None:
        raise explain("look up", uri, FileNotFoundError(uri))
    if info.get("size") is None:
        raise DataError(
            f"storage: {redact(uri)}: the server does not say how large the file is, so it cannot "
            "be read in parts."
        )
    return int(info["size"])


def list_files(
    uri: str, *, recursive: bool = False, on_other: OnOther = ignore_others
) -> Iterator[FileInfo]:
    """Yield the files of a folder, in no particular order.

    Local folders are streamed; links to files and folders are followed, a folder reached twice is
    listed once.

    Args:
        uri: The folder.
        recursive: Go into folders below.
        on_other: Told of a local folder's entries that are not files, such as dead links.

    Raises:
        DataError: There is no such folder.
    """
    if is_local(uri):
        yield from list_local(
            uri, local_path(uri), recursive=recursive, on_other=on_other
        )
        return
    scheme, uri = split_scheme(uri)
    found = in_store(
        "list",
        uri,
        lambda fs: (
            fs.find(uri, detail=True)
            if recursive
            else {e["name"]: e for e in fs.ls(uri, detail=True)}
        ),
    )
    # Object storage knows no folders: an empty answer is either an empty prefix or a wrong one.
    if not found and not exists(uri):
        raise explain("list", uri, FileNotFoundError(uri))
    base = SCHEME.sub("", uri).strip("/") + "/"
    for name, entry in found.items():
        path = str(name).lstrip("/")
        if (
            entry.get("type") == "file"
            and path.startswith(base)
            and not path.endswith("/")
        ):
            # Stores name it each in their own way.
            version = str(
                entry.get("ETag")
                or entry.get("etag")
                or entry.get("LastModified")
                or entry.get("created")
                or ""
            )
            yield FileInfo(
                path[len(base) :], f"{scheme}://{path}", int(entry["size"]), version
            )
