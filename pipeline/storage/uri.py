"""What a URI is here: which schemes are opened, how parts are joined, what must never be shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pipeline.errors import ConfigError

SCHEMES = ("file", "memory", "s3", "gs", "az", "https")
"""URL schemes that may be opened. Everything else, `pipe:` above all, is refused."""
SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://")
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
    """Return (scheme, path); the scheme of a plain path is empty."""
    chained = _CHAIN.match(uri)
    found = SCHEME.match(uri)
    scheme = found.group(1).lower() if found else ""
    if chained or (found and scheme not in SCHEMES):
        kind = chained.group(1) if chained else f"{scheme}://"
        raise ConfigError(
            f"storage: {redact(uri)!r} starts with {kind!r}, which is not opened. Expected a plain "
            "path or one of "
            f"{', '.join(name + '://' for name in SCHEMES)}. Download the data first, or give its "
            "object-storage URI "
            "(shards are cached on local disk by the loader itself)."
        )
    if not uri:
        raise ConfigError(
            "storage: the path is empty. Give a folder or a URI such as s3://bucket/folder."
        )
    if scheme in ("", "file"):
        return scheme, uri[found.end() :] if found else uri
    return scheme, uri


def join(uri: str, *parts: str) -> str:
    """Append path parts to a folder's URI."""
    split_scheme(uri)
    scheme = SCHEME.match(uri)
    root = uri[: scheme.end()] if scheme else ""
    head = uri[len(root) :].rstrip("/")
    if not head and uri.endswith("/") and root in ("", "file://"):
        root += "/"
    tail = "/".join(part.strip("/") for part in parts)
    return root + "/".join(part for part in (head, tail) if part)


def absolute(uri: str) -> str:
    """Return a URI that names the same place from every working folder; links are kept."""
    scheme, path = split_scheme(uri)
    return uri if scheme not in ("", "file") else str(Path(path).expanduser().absolute())


def name_of(uri: str) -> str:
    """Return the last part of a URI's path."""
    return split_scheme(uri)[1].partition("?")[0].rstrip("/").rsplit("/", 1)[-1]


def redact(text: str) -> str:
    """Take user names, passwords and query strings out of every URL in a text, and known secrets
    out of the rest."""
    clean = _URL_SECRETS.sub(r"\1\2", text)
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= 4:
            clean = clean.replace(secret, "***")
    return clean
