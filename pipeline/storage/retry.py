"""Which storage failures may pass by themselves, how long they are retried, and what the user is
told."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_delay,
    wait_exponential_jitter,
)

from pipeline.errors import ConfigError, DataError, InfrastructureError, MaelstromError
from pipeline.storage.uri import redact

logger = logging.getLogger(__name__)
T = TypeVar("T")
BUDGET_VARIABLE = "MAELSTROM_STORAGE_BUDGET_S"
"""Environment variable: seconds a failing storage call is retried for. 60 if it is not set."""
_TRANSIENT_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EPIPE,
    errno.EREMOTEIO,
    errno.ETIMEDOUT,
}
# By name, so that neither botocore nor aiohttp is imported if it is not used.
_TRANSIENT_NAMES = {
    "ClientConnectionError",
    "ClientOSError",
    "ClientPayloadError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "ConnectionError",
    "EndpointConnectionError",
    "FlexibleChecksumError",  # what came is not what the server's own checksum says
    "HTTPClientError",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "ServerDisconnectedError",
    "ServerTimeoutError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TimeoutError",
}


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(8):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed a little later."""
    # As a failed connection it looks like the network's fault, and passes no sooner for waiting.
    if has_too_many_files(error):
        return False
    # Clients wrap what the network said: the cause counts as much as the error itself.
    for link in _chain(error):
        status = getattr(link, "status", None)
        if isinstance(status, int) and (status >= 500 or status == 429):
            return True
        if isinstance(link, socket.gaierror) or any(
            kind.__name__ in _TRANSIENT_NAMES for kind in type(link).__mro__
        ):
            return True
        if isinstance(link, OSError) and link.errno in _TRANSIENT_ERRNO:
            return True
    return False


TOO_MANY_FILES = (
    "too many open files. Allow more with `ulimit -n 65536` in the shell that starts the command "
    "(as root or in /etc/security/limits.conf if the hard limit, `ulimit -Hn`, is lower)."
)
"""What is said of EMFILE and ENFILE, wherever they are met."""


def has_too_many_files(error: BaseException) -> bool:
    """Return whether a process, or the machine, had no file descriptor left."""
    codes = (errno.EMFILE, errno.ENFILE)
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in codes:
            return True
        # The loader of shared libraries has only words for it.
        if isinstance(link, ImportError) and os.strerror(errno.EMFILE) in str(link):
            return True
    return False


def _budget_s() -> float:
    text = os.environ.get(BUDGET_VARIABLE, "60")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise ConfigError(
            f"storage: {BUDGET_VARIABLE}={text!r} is not a number of seconds."
        ) from None


def _say_retry(
    uri: str, on_retry: Callable[[], None]
) -> Callable[[RetryCallState], None]:
    def say(state: RetryCallState) -> None:
        on_retry()
        error = state.outcome.exception() if state.outcome else None
        logger.warning(
            "storage: %s: attempt %d failed (%s), retrying",
            redact(uri),
            state.attempt_number,
            _brief(error),
        )

    return say


def _brief(error: BaseException | None) -> str:
    return (
        redact(f"{type(error).__name__}: {error}")[:300]
        if error is not None
        else "no error"
    )


def explain(action: str, uri: str, error: BaseException) -> MaelstromError:
    """Turn a file system's exception into an error that says what, where and what to do."""
    where = f"storage: cannot {action} {redact(uri)}"
    if isinstance(error, MaelstromError):
        return error
    if has_too_many_files(error):
        return InfrastructureError(f"{where}: {TOO_MANY_FILES}")
    code = error.errno if isinstance(error, OSError) else None
    # From what is sure to what is only likely: the texts of the last ones are a guess.
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EPERM):
        return InfrastructureError(
            f"{where}: permission denied. Check the owner and mode of the path, or the credentials "
            "in the environment."
        )
    if code == errno.EROFS:
        return InfrastructureError(
            f"{where}: the file system is read-only. Choose another folder or remount it."
        )
    if code in (errno.ENOSPC, errno.EDQUOT):
        return InfrastructureError(
            f"{where}: {os.strerror(code)}. Free some space or choose another folder."
        )
    if isinstance(error, FileNotFoundError) and not is_transient(error):
        hint = ""
        if uri.lower().startswith("file:") and "%" in uri:
            hint = " Escapes such as %20 are not decoded: give the plain path."
        return DataError(
            f"{where}: not found. Check the path, the bucket and the spelling.{hint}"
        )
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return DataError(
            f"{where}: {_brief(error)}. A file was expected there."
            if action == "read"
            else f"{where}: {_brief(error)}."
        )
    if (
        "credential" in type(error).__name__.lower()
        or "credential" in str(error).lower()
    ):
        return InfrastructureError(
            f"{where}: {_brief(error)}. Set the storage's usual variables (for S3 "
            "AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or a profile or instance role)."
        )
    if is_transient(error):
        return InfrastructureError(
            f"{where}: {_brief(error)}, after retrying for {_budget_s():g} s. Check the network "
            "and the endpoint "
            f"(for S3 AWS_ENDPOINT_URL); {BUDGET_VARIABLE} sets how long is retried."
        )
    return InfrastructureError(f"{where}: {_brief(error)}.")


def with_retries(
    action: str,
    uri: str,
    call: Callable[[], T],
    *,
    on_retry: Callable[[], None] = lambda: None,
) -> T:
    """Run one storage call, retrying what may pass by itself, and explain what does not.

    Args:
        action: What is done, in the infinitive; for messages.
        uri: To what; redacted in messages.
        call: The call; made again from its start.
        on_retry: Told before each further attempt, for counting.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_exponential_jitter(initial=0.2, max=8.0, jitter=0.5),
        # A budget of time, not of attempts: an outage lasts as long as it lasts.
        stop=stop_after_delay(_budget_s()),
        before_sleep=_say_retry(uri, on_retry),
        reraise=True,
    )
    try:
        return retrying(call)
    except Exception as error:
        raise explain(action, uri, error) from error
