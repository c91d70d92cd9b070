"""The fast path for reads from S3: obstore, where it is installed. Everything else goes through
fsspec.

A ranged read costs a fifth of s3fs's CPU time and half its wall time here
(docs/benchmarks/storage.md). Endpoint, region and credentials are botocore's, so that both ways see
the same environment, profile or instance role. What this path cannot do or does not understand it
leaves to s3fs, whose errors are the ones that are explained to the user.
"""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib import import_module
from typing import Any

from pipeline.storage.uri import SCHEME

_OF_BOTOCORE = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE")
"""Certificates that only botocore knows; if they are given for an https endpoint, s3fs reads."""
_ENVIRONMENT = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AWS_CONFIG_FILE",
    "AWS_ACCESS_KEY_ID",
    *_OF_BOTOCORE,
)
"""What a store depends on. Another value makes another store; the secret itself is looked up when
it is needed."""
_CLIENT_ERROR = re.compile(r"status code: (?!408|429)[34]\d\d")
_CREDENTIALS_LIVE = timedelta(minutes=1)
"""How long obstore keeps credentials that expire before it asks botocore, which renews them,
again."""
_making = threading.Lock()


class Unsure:
    """The answer of a fast path that leaves a read to the slow one."""


UNSURE = Unsure()


def read_s3(uri: str, start: int | None, length: int | None) -> memoryview | Unsure:
    """Read an object, or a range of it, in one attempt.

    Args:
        uri: `s3://bucket/key`.
        start: First byte; None for the whole object.
        length: Bytes; None reads to the end.

    Returns:
        The bytes, not copied; `UNSURE` if s3fs should be asked instead.

    Raises:
        OSError: with EIO: the store or the network failed in a way that may pass.
    """
    bucket, _, key = SCHEME.sub("", uri).partition("/")
    if length is None and start is not None:
        return UNSURE
    if _first_process() != os.getpid():
        return UNSURE  # forked: the threads that obstore had in the parent are not here
    # Many threads ask at once in the beginning: one makes the store, which takes a while.
    with _making:
        store = _store(bucket, tuple(os.environ.get(name) for name in _ENVIRONMENT))
    if store is None:
        return UNSURE
    obstore, exceptions = import_module("obstore"), import_module("obstore.exceptions")
    try:
        if start is None:
            return memoryview(obstore.get(store, key).bytes())
        return memoryview(obstore.get_range(store, key, start=start, length=length))
    except exceptions.GenericError as error:
        if _CLIENT_ERROR.search(str(error)):
            return UNSURE
        raise OSError(errno.EIO, _first_line(error)) from None
    except (exceptions.BaseError, ValueError, OSError):
        return UNSURE  # not found, not allowed, a key it does not like


def _first_line(error: Exception) -> str:
    # obstore appends the source code of its own error value.
    return str(error).partition("\n")[0]


@lru_cache(maxsize=64)
def _store(bucket: str, environment: tuple[str | None, ...]) -> Any:
    """Make a bucket's store; None if obstore is not installed, or is told less than botocore
    is."""
    try:
        import_module("obstore")
        stores, session_module = (
            import_module("obstore.store"),
            import_module("botocore.session"),
        )
    except ImportError:
        return None
    # botocore knows all the ways in which credentials and endpoints can be given; obstore does not.
    session = session_module.get_session()
    credentials = session.get_credentials()
    if credentials is None or session.get_scoped_config().get("s3"):
        return None
    client = session.create_client("s3")
    endpoint, region = str(client.meta.endpoint_url), str(client.meta.region_name)
    named = dict(zip(_ENVIRONMENT, environment, strict=True))
    if endpoint.startswith("https://") and any(named[name] for name in _OF_BOTOCORE):
        return None
    is_aws = endpoint.startswith("https://s3.") and ".amazonaws.com" in endpoint
    return stores.S3Store(
        bucket,
        region="us-east-1" if region == "aws-global" else region,
        credential_provider=_provider(credentials),
        # Retries are ours: counted, and inside one budget.
        retry_config={"max_retries": 0},
        client_options={
            "connect_timeout": timedelta(seconds=10),
            "read_timeout": timedelta(seconds=60),
            "timeout": timedelta(minutes=10),
            "allow_http": endpoint.startswith("http://"),
        },
        **(
            {}
            if is_aws
            else {"endpoint": endpoint, "virtual_hosted_style_request": False}
        ),
    )


def _provider(credentials: Any) -> Callable[[], dict[str, Any]]:
    is_lasting = type(credentials).__name__ == "Credentials"

    def provide() -> dict[str, Any]:
        # Key, secret and token of one moment: a renewal between two reads would mix them.
        current = credentials.get_frozen_credentials()
        return {
            "access_key_id": current.access_key,
            "secret_access_key": current.secret_key,
            "token": current.token,
            "expires_at": None if is_lasting else datetime.now(UTC) + _CREDENTIALS_LIVE,
        }

    return provide


@lru_cache(maxsize=1)
def _first_process() -> int:
    """Return the process that read first; a child that was forked from it inherits the answer."""
    return os.getpid()
