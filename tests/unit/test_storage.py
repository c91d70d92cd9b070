"""The door to storage: what it opens, what it refuses, and that nobody sees half a file."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pwd
import re
import resource
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import ConfigError, DataError, InfrastructureError, MaelstromError
from pipeline.storage.retry import BUDGET_VARIABLE, explain, is_transient, with_retries
from pipeline.storage.uri import split_scheme
from tests.limits import HANG_S


@pytest.fixture(params=["local", "file", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    kinds = {
        "local": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://storage-{tmp_path.name}",
    }
    return kinds[request.param]


def test_what_is_written_is_read(folder: str) -> None:
    uri = storage.join(folder, "a", "b.bin")
    storage.write_atomic(uri, b"hello world")
    assert storage.read_bytes(uri) == b"hello world"
    assert storage.read_bytes(uri, 6, 5) == b"world"
    assert storage.read_bytes(uri, 6) == b"world"
    assert storage.read_bytes(uri, 6, 0) == b""
    assert storage.size_of(uri) == 11
    assert storage.exists(uri)
    with storage.open_read(uri) as file:
        assert file.read(3) == b"hel"
        assert file.read() == b"lo world"
    storage.write_atomic(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.delete(uri)
    storage.delete(uri)
    assert not storage.exists(uri)


def test_a_listing_has_names_and_sizes(folder: str, tmp_path: Path) -> None:
    for name in ("x.bin", "sub/y.bin", "sub/deep/z.bin"):
        storage.write_atomic(storage.join(folder, name), name.encode())
    flat = list(storage.list_files(folder))
    assert [(file.name, file.size_bytes) for file in flat] == [("x.bin", 5)]
    deep = {
        file.name: storage.read_bytes(file.uri).decode()
        for file in storage.list_files(folder, recursive=True)
    }
    assert deep == {name: name for name in ("x.bin", "sub/y.bin", "sub/deep/z.bin")}
    with pytest.raises(DataError, match="not found"):
        list(storage.list_files(storage.join(folder, "nowhere")))


def test_a_folder_linked_into_itself_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.bin").write_bytes(b"a")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [
        file.name for file in storage.list_files(str(tmp_path), recursive=True)
    ] == ["sub/a.bin"]


@pytest.mark.parametrize(("start", "length"), [(0, 12), (6, 6), (20, 1)])
def test_a_short_read_is_an_error(folder: str, start: int, length: int) -> None:
    uri = storage.join(folder, "a.bin")
    storage.write_atomic(uri, b"hello world")
    with pytest.raises(DataError, match=f"wanted {length} bytes at offset {start}"):
        storage.read_bytes(uri, start, length)


def test_a_missing_file_is_named(folder: str) -> None:
    uri = storage.join(folder, "none.bin")
    with pytest.raises(DataError, match=r"none\.bin: not found"):
        storage.read_bytes(uri)
    with pytest.raises(DataError, match=r"none\.bin: not found"):
        storage.size_of(uri)


def test_put_if_absent_writes_once(folder: str) -> None:
    uri = storage.join(folder, "lease")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert storage.read_bytes(uri) == b"first"


def test_one_of_many_threads_wins(tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    won = []

    def race(number: int) -> None:
        barrier.wait()
        if storage.put_if_absent(str(tmp_path / "lease"), f"{number}".encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "lease").read_bytes() == f"{won[0]}".encode() * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_put_file_copies(folder: str, tmp_path: Path) -> None:
    local = tmp_path / "source"
    local.write_bytes(b"x" * 3_000_000)
    storage.put_file(local, storage.join(folder, "target"))
    assert storage.read_bytes(storage.join(folder, "target")) == local.read_bytes()
    assert local.exists()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InfrastructureError, match="No space left") as caught:
        storage.write_atomic(str(path), b"new")
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    "uri",
    [
        "pipe:cat /etc/passwd",
        "ftp://host/x",
        "simplecache::s3://b/x",
        "http://host/x",
        "hdfs://x",
        "",
    ],
)
def test_other_schemes_are_refused(uri: str) -> None:
    for call in (
        storage.read_bytes,
        storage.exists,
        storage.open_read,
        storage.is_local,
        storage.join,
    ):
        with pytest.raises(ConfigError, match=r"plain path|empty"):
            call(uri)


def test_a_pipe_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError):
        storage.read_bytes(f"pipe:touch {canary}")
    assert not canary.exists()


def test_https_is_read_only() -> None:
    with pytest.raises(ConfigError, match="read only"):
        storage.write_atomic("https://host/x", b"")


def test_a_missing_extra_is_named() -> None:
    pytest.importorskip("s3fs")
    for scheme, extra in (("gs", "gcs"), ("az", "azure")):
        try:
            __import__({"gs": "gcsfs", "az": "adlfs"}[scheme])
        except ImportError:
            with pytest.raises(ConfigError, match=rf"\.\[{extra}\]"):
                storage.read_bytes(f"{scheme}://bucket/x")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pass@host/a/b?sig=abc", "https://host/a/b"),
        (
            "see s3://key:secret@bucket/x and s3://b/y?versionId=1.",
            "see s3://bucket/x and s3://b/y",
        ),
        ("no URL: a@b ? c", "no URL: a@b ? c"),
        ("https://host/p@th", "https://host/p@th"),
    ],
)
def test_secrets_are_taken_out_of_urls(text: str, clean: str) -> None:
    assert storage.redact(text) == clean


def test_known_secrets_are_taken_out_of_any_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    assert storage.redact("key=hush-hush!") == "key=***!"


def test_errors_name_no_secret() -> None:
    with pytest.raises(MaelstromError) as caught:
        storage.read_bytes("ftp://me:hush@host/x?token=hush")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "parts", "joined"),
    [
        ("/a/", ("b", "c"), "/a/b/c"),
        ("s3://b", ("x",), "s3://b/x"),
        ("/", ("x",), "/x"),
        ("a", (), "a"),
        ("memory://", ("x",), "memory://x"),
        ("file:///", ("x",), "file:///x"),
        ("file:///a/", ("x", "y/"), "file:///a/x/y"),
    ],
)
def test_join(uri: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(uri, *parts) == joined
    if parts:
        assert storage.name_of(joined) == parts[-1].strip("/")


def test_remote_is_not_local() -> None:
    assert storage.is_local("/a")
    assert not storage.is_local("s3://a")
    with pytest.raises(ConfigError):
        storage.local_path("s3://a/b")


# ------------------------------------------------------------------------------------------ retries


def test_what_passes_by_itself_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUDGET_VARIABLE, "30")
    failures = [TimeoutError("slow"), ConnectionResetError("reset")]

    def call() -> str:
        if failures:
            raise failures.pop()
        return "there"

    assert with_retries("read", "s3://b/x", call) == "there"


def test_the_budget_ends_the_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(BUDGET_VARIABLE, "0")
    calls = []

    def call() -> None:
        calls.append(1)
        raise ConnectionResetError("reset")

    with pytest.raises(InfrastructureError, match="after retrying") as caught:
        with_retries("read", "s3://b/x", call)
    assert "s3://b/x" in str(caught.value)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error", [PermissionError("no"), FileNotFoundError("no"), ValueError("no")]
)
def test_what_does_not_pass_is_not_retried(error: Exception) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(MaelstromError):
        with_retries("read", "s3://b/x", call)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError(errno.EACCES, "x"), InfrastructureError, "permission denied"),
        (OSError(errno.EROFS, "x"), InfrastructureError, "read-only"),
        (OSError(errno.ENOSPC, "x"), InfrastructureError, "No space left"),
        (OSError(errno.EDQUOT, "x"), InfrastructureError, "quota"),
        (FileNotFoundError(errno.ENOENT, "x"), DataError, "not found"),
    ],
)
def test_each_failure_has_its_exit_code(
    error: OSError, kind: type[MaelstromError], message: str
) -> None:
    explained = explain("write", "/some/path", error)
    assert isinstance(explained, kind)
    assert "/some/path" in str(explained)
    assert message.lower() in str(explained).lower()


def _read_in_child(uri: str, queue: multiprocessing.Queue[bytes]) -> None:
    queue.put(storage.read_bytes(uri))


def test_a_forked_child_reads_too(tmp_path: Path) -> None:
    uri = str(tmp_path / "a")
    storage.write_atomic(uri, b"x")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(uri, queue))
    child.start()
    assert queue.get(timeout=HANG_S) == b"x"
    child.join()


# ---------------------------------------------------------------------------------- what is written
@pytest.mark.parametrize("uri", ["S3://bucket/a", "s3://bucket/a"])
def test_the_case_of_a_scheme_does_not_matter(uri: str) -> None:
    assert split_scheme(uri) == ("s3", "s3://bucket/a")
    assert storage.join(uri, "b") == "s3://bucket/a/b"
    assert not storage.is_local(uri)


def test_an_upper_case_scheme_reads_and_writes() -> None:
    storage.write_atomic("MEMORY://folder-of-case/a", b"abc")
    assert storage.read_bytes("memory://folder-of-case/a") == b"abc"
    assert storage.read_bytes("Memory://folder-of-case/a", 1, 1) == b"b"
    assert storage.size_of("MEMORY://folder-of-case/a") == 3
    assert [file.name for file in storage.list_files("MEMORY://folder-of-case")] == [
        "a"
    ]
    assert storage.put_if_absent("MEMORY://folder-of-case/b", b"b")
    storage.delete("MEMORY://folder-of-case/b")
    assert not storage.exists("memory://folder-of-case/b")
    storage.delete("memory://folder-of-case/a")


def test_file_uris_name_local_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    for root in ("file://", "FILE://", "file:", "file://localhost"):
        assert storage.read_bytes(f"{root}{tmp_path}/a") == b"abc"
        assert storage.read_bytes(storage.join(f"{root}{tmp_path}", "a")) == b"abc"
        assert [file.name for file in storage.list_files(f"{root}{tmp_path}")] == ["a"]
    with pytest.raises(DataError, match="not decoded"):
        storage.read_bytes(f"file://{tmp_path}/a%20b")


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("gcs://bucket/a", "Write gs://"),
        ("s3a://bucket/a", "Write s3://"),
        ("abfss://bucket/a", "Write az://"),
        ("http://host/a", "Write https://"),
        ("ftp://host/a", "Download the data first"),
        ("hdfs://host/a", "Download the data first"),
        ("s3:/bucket/a", "Write s3://bucket/a"),
        ("GS:/bucket/a", "Write gs://bucket/a"),
        ("s3://", "names no bucket"),
        ("s3:///a", "names no bucket"),
        ("a\0b", "NUL byte"),
        ("~nosuchuser/x", "there is no user called 'nosuchuser'"),
        ("file://~nosuchuser/x", "there is no user called 'nosuchuser'"),
    ],
)
def test_what_is_not_opened_says_what_to_write(uri: str, says: str) -> None:
    for call in (
        storage.exists,
        storage.read_bytes,
        lambda uri: list(storage.list_files(uri)),
    ):
        with pytest.raises(ConfigError, match=re.escape(says)):
            call(uri)


def test_the_home_folder_is_looked_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = pwd.getpwuid(os.getuid())
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.local_path("~/a") == tmp_path / "a"
    assert storage.local_path("~") == tmp_path
    assert storage.local_path(f"~{known.pw_name}/a") == Path(known.pw_dir) / "a"
    assert storage.local_path("a/~/b") == Path("a/~/b")
    assert storage.cache_home() == f"{tmp_path}/.cache"
    # An empty HOME counts as none.
    for change in (
        lambda: monkeypatch.setenv("HOME", ""),
        lambda: monkeypatch.delenv("HOME"),
    ):
        change()
        assert storage.local_path("~/a") == Path(known.pw_dir) / "a"
        assert storage.cache_home() == f"{known.pw_dir}/.cache"


def test_a_user_without_a_home_is_told_what_to_set(tmp_path: Path) -> None:
    """In a process of its own that runs under a number that no user has."""
    if os.getuid():
        pytest.skip("only root may run as another user")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.environ.pop("HOME", None)
        os.environ.pop("XDG_CACHE_HOME", None)
        os.setuid(54_321)
        for call in (lambda: storage.exists("~/a"), storage.cache_home):
            try:
                call()
            except ConfigError as error:
                os.write(writer, f"{error}\n".encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        lines = told.read().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "Set HOME" in line
        assert "XDG_CACHE_HOME" in line


def test_too_many_open_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(InfrastructureError, match="ulimit -n"):
            storage.read_bytes(str(tmp_path / "a"))
        with pytest.raises(InfrastructureError, match="ulimit -n"):
            list(storage.list_files(str(tmp_path)))
        with pytest.raises(InfrastructureError, match="ulimit -n"):
            storage.write_atomic(str(tmp_path / "b"), b"abc")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        os.close(lowest)


def test_an_exhausted_process_is_not_a_network_to_wait_for() -> None:
    failed = ConnectionError("cannot connect")
    failed.__cause__ = OSError(errno.EMFILE, "Too many open files")
    assert not is_transient(failed)
    assert "ulimit -n" in str(explain("read", "s3://bucket/a", failed))
