"""A proxy before an object store that does what networks and stores do on bad days, and counts what
it did."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import re
import socket
import struct
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

import pytest

from tests.limits import HANG_S

Kind = Literal["503", "500", "403", "reset", "cut", "cut_reset", "slow", "flip", "hang"]
Body = Literal["any", "ranged", "full"]
_PASSED_ON = ("content-type", "content-range", "etag", "last-modified", "accept-ranges")


@dataclasses.dataclass
class Fault:
    """Something to do to the next GETs of objects.

    `503`, `500`, `403`: answer so. `reset`: RST before a reply.
    `cut`, `cut_reset`: end (FIN, RST) in the middle of the body.
    `slow`: the body in twenty pieces with pauses. `flip`: one bit of the body is another, under the
    store's headers. Where in the body, as a share of it, is `at`.
    `hang`: half of the body, and the rest when the proxy is released.
    """

    kind: Kind
    times: int
    match: str
    body: Body
    at: float = 0.5
    method: str = "GET"

    def applies(self, path: str, *, is_ranged: bool, method: str) -> bool:
        if method != self.method:
            return False
        wanted = {"any": True, "ranged": is_ranged, "full": not is_ranged}[self.body]
        return self.times > 0 and wanted and re.search(self.match, path) is not None


class FaultProxy:
    """The proxy's controls.

    Attributes:
        url: endpoint to use in place of the store's.
        done: how often each fault happened.
        requests: GETs of objects that were seen, faulty or not.
    """

    def __init__(self, upstream: str) -> None:
        self.upstream = urllib.parse.urlsplit(upstream)
        self.done: Counter[str] = Counter()
        self.requests: list[str] = []
        self.released = threading.Event()
        self.hanging = threading.Event()
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self._outage: tuple[str, float] | None = None
        self._back_at = 0.0
        self.url = ""

    def plan_outage(self, seconds: float, *, match: str) -> None:
        """Answer 503 to every request for so long, and to two at least, from the next PUT on whose
        path holds `match`."""
        self._outage = (match, seconds)

    def is_out(self, method: str, path: str) -> bool:
        """Tell whether a request meets an outage, which it may begin."""
        with self._lock:
            if self._outage and method == "PUT" and re.search(self._outage[0], path):
                self._back_at, self._outage = time.monotonic() + self._outage[1], None
            # At least a second request, however long a slow client takes to send it.
            begun = self._back_at > 0
            out = time.monotonic() < self._back_at or (
                begun and self.done["outage"] < 2
            )
            self.done["outage"] += out
            return out

    def plan(
        self,
        kind: Kind,
        *,
        times: int = 1,
        match: str = "",
        body: Body = "any",
        at: float = 0.5,
        method: str = "GET",
    ) -> None:
        """Do something to the next `times` requests whose path holds `match` and that ask for such
        a body."""
        self._faults.append(Fault(kind, times, match, body, at, method))

    def take(self, path: str, *, is_ranged: bool, method: str = "GET") -> Fault | None:
        """Note a GET of an object and say which fault a request meets."""
        with self._lock:
            if method == "GET":
                self.requests.append(path)
            for fault in self._faults:
                if fault.applies(path, is_ranged=is_ranged, method=method):
                    fault.times -= 1
                    self.done[fault.kind] += 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultProxy

    def handle_one_request(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()
            return
        self.close_connection = True

    def do_GET(self) -> None:
        if self._is_out():
            return
        path = urllib.parse.urlsplit(self.path)
        is_object = (
            path.path.count("/") > 1
            and not path.path.endswith("/")
            and "list-type" not in path.query
        )
        fault = (
            self.proxy.take(path.path, is_ranged="Range" in self.headers)
            if is_object
            else None
        )
        kind = fault.kind if fault else ""
        if kind == "reset":
            self._reset()
        elif kind in ("403", "500", "503"):
            self._refuse(kind)
        else:
            self._forward(fault)

    def _refuse(self, kind: str) -> None:
        code = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}[kind]
        error = f"<Error><Code>{code}</Code><Message>not now</Message></Error>"
        text = f"<?xml version='1.0'?>{error}".encode()
        self._head(int(kind), {"Content-Type": "application/xml"}, len(text))
        if self.command != "HEAD":
            self.wfile.write(text)

    def _is_out(self) -> bool:
        out = self.proxy.is_out(self.command, self.path)
        if out:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self._refuse("503")
        return out

    def do_HEAD(self) -> None:
        if not self._is_out():
            self._forward(None)

    def do_PUT(self) -> None:
        if self._is_out():
            return
        fault = self.proxy.take(
            urllib.parse.urlsplit(self.path).path, is_ranged=False, method=self.command
        )
        if fault is None:
            self._forward(None)
            return
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._refuse(fault.kind)

    do_POST = do_PUT

    def do_DELETE(self) -> None:
        if not self._is_out():
            self._forward(None)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self, fault: Fault | None) -> None:
        """Ask the store with the headers as they came, Host too, so that the request's signature
        holds."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(
            self.proxy.upstream.hostname or "", self.proxy.upstream.port, timeout=HANG_S
        )
        try:
            upstream.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() != "connection":
                    upstream.putheader(name, value)
            upstream.endheaders(sent)
            reply = upstream.getresponse()
            data = reply.read()
        finally:
            upstream.close()
        headers = {
            name: value
            for name, value in reply.getheaders()
            if name.lower() in _PASSED_ON
        }
        headers |= {
            name: value
            for name, value in reply.getheaders()
            if name.lower().startswith("x-amz-")
        }
        size = (
            int(reply.headers.get("Content-Length") or 0)
            if self.command == "HEAD"
            else len(data)
        )
        self._head(reply.status, headers, size)
        if self.command != "HEAD" and reply.status != 204:
            self._body(data, fault)

    def _head(self, status: int, headers: dict[str, str], size: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()

    def _body(self, data: bytes, fault: Fault | None) -> None:
        kind = fault.kind if fault else ""
        half = int(len(data) * fault.at) if fault else 0
        if kind == "flip":
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        if kind == "slow":
            step = max(1, len(data) // 20)
            for start in range(0, len(data), step):
                self.wfile.write(data[start : start + step])
                self.proxy.released.wait(0.02)
        elif kind in ("cut", "cut_reset", "hang"):
            self.wfile.write(data[:half])
            if kind == "hang":
                self.proxy.hanging.set()
                self.proxy.released.wait(HANG_S)
                self.wfile.write(data[half:])
            elif kind == "cut":
                self.close_connection = True
            else:
                self._reset()
        else:
            self.wfile.write(data)

    def _reset(self) -> None:
        self.wfile.flush()
        self.connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.connection.close()
        self.close_connection = True
        raise ConnectionResetError


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def shutdown_request(self, request: object) -> None:
        with contextlib.suppress(OSError):  # the handler may have reset it
            super().shutdown_request(request)  # type: ignore[arg-type]


@pytest.fixture
def fault_proxy(s3_server) -> Iterator[FaultProxy]:
    """Run the proxy before the session's S3 server. `AWS_ENDPOINT_URL` names it once
    `through_proxy` is asked for."""
    proxy = FaultProxy(s3_server.endpoint_url)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    server = _Server(("127.0.0.1", 0), handler)
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    yield proxy
    proxy.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def through_proxy(
    fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], FaultProxy]:
    """Give a function that sends this process's S3 calls through the proxy from then on."""

    def switch() -> FaultProxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", fault_proxy.url)
        return fault_proxy

    return switch
