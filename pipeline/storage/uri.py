"""What a URI is here: which schemes are opened, how parts are joined, what must never be shown."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path
from urllib.parse import urlsplit

from pipeline.errors import ConfigError

SCHEMES = ("file", "memory", "s3", "gs", "az", "https")
"""URL schemes that may be opened. Everything else, `pipe:` above all, is refused."""
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
_HAS_BUCKETS = ("s3", "gs", "az")
_OTHER_NAMES = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "abfs": "az",
    "abfss": "az",
    "wasb": "az",
    "wasbs": "az",
    "http": "https",
}
"""Names that other programs have for the same storage; http is left out for what it carries in the
clear."""
_CHAIN = re.compile(r"^(pipe:|\w+::)")
_URL_SECRETS = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/@'\"]*@)?([^\s?'\"]*)(\?[^\s'\"]*)?"
)
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "AZURE_STORAGE_ACCOUNT_KEY",
)


def split_scheme(uri: str) -> tuple[str, str]:
    """Return (scheme, path); the scheme of a plain path is empty.

    The path of a remote URI is the URI itself, its scheme in lower case (`S3://` is written, too).

    Raises:
        ConfigError: It is empty, names no bucket, or has a scheme that is not opened.
    """
    # First of all, as a Path makes "." of it: the working folder would be taken for a dataset.
    if not uri:
        raise ConfigError(
            "storage: the path is empty. Give a folder or a URI such as s3://bucket/folder."
        )
    if "\0" in uri:
        raise ConfigError(
            f"storage: {redact(uri)!r} has a NUL byte, which no path can have."
        )
    # fsspec would run the first and follow the second: neither reaches it.
    chained = _CHAIN.match(uri)
    found = SCHEME.match(uri)
    scheme = found.group(1).lower() if found else ""
    if chained or (found and scheme not in SCHEMES):
        raise _not_opened(uri, chained.group(1) if chained else f"{scheme}://")
    if found is None:
        return _split_without_slashes(uri)

    rest = uri[found.end() :]
    if scheme == "file":
        # RFC 8089 allows the name of this machine in front of the path.
        return scheme, rest.removeprefix("localhost") if rest.startswith(
            "localhost/"
        ) else rest
    if scheme in _HAS_BUCKETS and not rest.partition("/")[0]:
        raise ConfigError(
            f"storage: {redact(uri)!r} names no bucket. Write {scheme}://bucket/folder."
        )
    if scheme == "https" and not _has_server(rest):
        raise ConfigError(
            f"storage: {redact(uri)!r} names no server that can be asked. Write https://server/file."
        )
    return scheme, f"{scheme}://{rest}"


def _has_server(rest: str) -> bool:
    """Tell whether what follows `https://` starts with a server and, if there is one, a port."""
    server = rest.partition("/")[0]
    try:
        parts = urlsplit(f"https://{server}")
        _ = parts.port  # raises if it is above 65535
        return bool(parts.hostname)
    except ValueError:  # a bracket that is not closed
        return False


def _split_without_slashes(uri: str) -> tuple[str, str]:
    """Take apart what has no `://`: a plain path, `file:/path`, or a URI that lacks a slash."""
    scheme, colon, rest = uri.partition(":")
    scheme = scheme.lower()
    if not colon or scheme not in SCHEMES:
        return "", uri
    if scheme == "file" and rest.startswith("/"):
        return scheme, rest
    if rest.startswith("/"):
        right = f"{scheme}://{rest.lstrip('/')}"
        raise ConfigError(
            f"storage: {redact(uri)!r} lacks a slash. Write {redact(right)}; for a local folder of "
            f"this name, ./{redact(uri)}"
        )
    return "", uri


def _not_opened(uri: str, kind: str) -> ConfigError:
    """Say that a scheme is not opened, and what to write instead."""
    known = ", ".join(f"{name}://" for name in SCHEMES)
    hint = (
        "Download the data first, or give its object-storage URI (shards are cached on local disk "
        "by the loader itself)."
    )
    # A scheme that is only spelled otherwise has a better remedy than a download.
    other = _OTHER_NAMES.get(kind.removesuffix("://"))
    if other is not None:
        hint = f"Write {other}:// in its place."
    return ConfigError(
        f"storage: {redact(uri)!r} starts with {kind!r}, which is not opened. Expected a plain "
        f"path or one of {known}. {hint}"
    )


def join(uri: str, *parts: str) -> str:
    """Append path parts to a folder's URI."""
    scheme, path = split_scheme(uri)
    if scheme not in ("", "file"):
        uri = path
    found = SCHEME.match(uri)
    # The slashes of the scheme are not the path's: "file:///" keeps all three.
    root = uri[: found.end()] if found else ""
    head = uri[len(root) :].rstrip("/")
    if not head and uri.endswith("/") and root in ("", "file://"):
        root += "/"
    tail = "/".join(part.strip("/") for part in parts)
    return root + "/".join(part for part in (head, tail) if part)


def absolute(uri: str) -> str:
    """Return a URI that names the same place from every working folder; links are kept."""
    scheme, path = split_scheme(uri)
    return (
        uri if scheme not in ("", "file") else str(Path(expand_home(path)).absolute())
    )


def expand_home(path: str) -> str:
    """Replace `~` and `~user` at the start of a path.

    Raises:
        ConfigError: The home folder is not known.
    """
    if not path.startswith("~"):
        return path
    user, slash, rest = path[1:].partition("/")
    try:
        home = pwd.getpwnam(user).pw_dir if user else home_folder()
    except KeyError:
        raise ConfigError(
            f"storage: {path!r}: there is no user called {user!r} on this machine. Write the whole "
            f"path; for a folder of this name, ./{path}"
        ) from None
    return f"{home.rstrip('/')}{slash}{rest}" or "/"


def home_folder() -> str:
    """Return the user's home folder, an absolute path.

    Raises:
        ConfigError: HOME is not set and the machine does not know the user, as in a container that
            runs under a number of its own.
    """
    # An empty HOME counts as none: `~/data` would become /data.
    if home := os.environ.get("HOME", ""):
        return home
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise ConfigError(
            f"storage: the home folder of user {os.getuid()} is not known, and HOME is not set. "
            "Set HOME, or write whole paths in place of ~; for the cache, set XDG_CACHE_HOME."
        ) from None


def cache_home() -> str:
    """Return the folder for caches: `$XDG_CACHE_HOME`, or `.cache` in the home folder."""
    return os.environ.get("XDG_CACHE_HOME") or f"{home_folder()}/.cache"


def name_of(uri: str) -> str:
    """Return the last part of a URI's path."""
    return split_scheme(uri)[1].partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def redact(text: str) -> str:
    """Take user names, passwords and query strings out of every URL in a text, and known secrets
    out of the rest."""
    # Signatures of presigned URLs stand in the query, so that all of it goes.
    clean = _URL_SECRETS.sub(r"\1\2", text)
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        # A secret of one or two letters would be taken out of every word.
        if len(secret) >= 4:
            clean = clean.replace(secret, "***")
    return clean
