"""What storage is measured against: plain clients as anybody would use them, a store on loopback, a
dataset to read."""

from __future__ import annotations

import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from pipeline.dataset.writer import write_dataset
from pipeline.errors import ConfigError, InfrastructureError
from pipeline.formats.webdataset_writer import WebDatasetWriter
from pipeline.images.header import Probe, probe

Job = tuple[str, int, int]
"""Key, first byte, bytes."""
_START_LIMIT_S = 30.0
_DISTINCT_IMAGES = 96


class Client(Protocol):
    """Reads of one bucket."""

    def read(self, key: str, start: int, length: int) -> int:
        """Read a range and return how many bytes came."""

    def read_whole(self, key: str) -> int:
        """Read an object and return how many bytes came."""


class Boto3Client:
    """boto3 with a connection a thread."""

    def __init__(self, bucket: str) -> None:
        botocore_config = import_module("botocore.config")
        # The default of ten connections would make the other streams wait.
        config = botocore_config.Config(max_pool_connections=64)
        boto3 = import_module("boto3")
        self._client = boto3.client("s3", config=config)
        self._bucket = bucket

    def read(self, key: str, start: int, length: int) -> int:
        """Read a range."""
        # HTTP ranges include their last byte.
        last = start + length - 1
        byte_range = f"bytes={start}-{last}"
        reply = self._client.get_object(Bucket=self._bucket, Key=key, Range=byte_range)
        data = reply["Body"].read()
        return len(data)

    def read_whole(self, key: str) -> int:
        """Read an object as a stream."""
        reply = self._client.get_object(Bucket=self._bucket, Key=key)
        # In pieces: joining them would measure the joining.
        parts = reply["Body"].iter_chunks(2**20)
        return sum(len(part) for part in parts)


class S3fsClient:
    """s3fs through its synchronous interface."""

    def __init__(self, bucket: str) -> None:
        s3fs = import_module("s3fs")
        self._fs = s3fs.S3FileSystem()
        self._bucket = bucket

    def read(self, key: str, start: int, length: int) -> int:
        """Read a range."""
        path = f"{self._bucket}/{key}"
        end = start + length
        data = self._fs.cat_file(path, start=start, end=end)
        return len(data)

    def read_whole(self, key: str) -> int:
        """Read an object."""
        path = f"{self._bucket}/{key}"
        data = self._fs.cat_file(path)
        return len(data)


class ObstoreClient:
    """obstore with its own settings."""

    def __init__(self, bucket: str) -> None:
        self._obstore: Any = import_module("obstore")
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        custom: dict[str, Any] = {}
        if endpoint:
            # A bucket's name in the host's needs a DNS entry, which a store on loopback lacks.
            custom = {"endpoint": endpoint, "virtual_hosted_style_request": False}
        options = {"allow_http": endpoint.startswith("http://")}
        make_store = import_module("obstore.store").S3Store
        self._store = make_store(bucket, client_options=options, **custom)

    def read(self, key: str, start: int, length: int) -> int:
        """Read a range."""
        data = self._obstore.get_range(self._store, key, start=start, length=length)
        return len(data)

    def read_whole(self, key: str) -> int:
        """Read an object as a stream."""
        reply = self._obstore.get(self._store, key)
        parts = reply.stream(min_chunk_size=2**20)
        return sum(len(part) for part in parts)


_CLIENTS: dict[str, tuple[str, Callable[[str], Client]]] = {
    "boto3": ("boto3", Boto3Client),
    "s3fs": ("s3fs", S3fsClient),
    "obstore": ("obstore", ObstoreClient),
}


def plain_clients(bucket: str) -> dict[str, Client]:
    """Make the plain clients that are installed."""
    clients: dict[str, Client] = {}
    for name, (package, make) in _CLIENTS.items():
        if importlib.util.find_spec(package) is not None:
            clients[name] = make(bucket)
    if not clients:
        raise ConfigError(
            "storage_bench: no plain client to compare with. Install one of boto3, s3fs, obstore"
        )
    return clients


def read_ranges(client: Client, jobs: list[Job], *, streams: int) -> int:
    """Read ranges with as many threads as streams; return the bytes that came."""
    with ThreadPoolExecutor(streams) as pool:

        def read(job: Job) -> int:
            return client.read(*job)

        parts = pool.map(read, jobs)
        return sum(parts)


def read_objects(client: Client, keys: list[str], *, streams: int) -> int:
    """Read whole objects with as many threads as streams; return the bytes that came."""
    with ThreadPoolExecutor(streams) as pool:
        sizes = pool.map(client.read_whole, keys)
        return sum(sizes)


@contextmanager
def loopback_store(root: Path) -> Iterator[str]:
    """Serve a folder's subfolders as S3 buckets on loopback, with AWS_* set for this process; gives
    the endpoint.

    Raises:
        ConfigError: localbucket is not installed.
        InfrastructureError: it did not start.
    """
    if importlib.util.find_spec("localbucket") is None:
        raise ConfigError(
            "storage_bench: there is no --uri, and localbucket, the store it would start, is not "
            "installed. Install it with: pip install localbucket"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    url = f"http://127.0.0.1:{port}"
    ours = {
        "AWS_ENDPOINT_URL": url,
        # Any key is accepted, but clients do not start without one.
        "AWS_ACCESS_KEY_ID": "bench",
        "AWS_SECRET_ACCESS_KEY": "bench-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Otherwise clients ask the cloud's metadata service, and wait for an answer that never
        # comes.
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }
    before = {}
    for variable in ours:
        before[variable] = os.environ.get(variable)
    command = [sys.executable, "-m", "localbucket", str(root)]
    command += ["--port", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        os.environ.update(ours)
        _wait_for(port, server)
        yield url
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=1)
            connection.close()
            return
        except OSError:
            time.sleep(0.02)
    exit_code = server.poll()
    raise InfrastructureError(
        f"storage_bench: localbucket did not answer on port {port} (exit code {exit_code})"
    )


def write_bench_dataset(folder: Path, *, num_shards: int, shard_bytes: int) -> int:
    """Write WebDataset shards of JPEGs of some 110 kB, of pictures that compress as photographs do.

    Returns:
        Samples written.
    """
    # Few images under many names: reading is measured, and encoding would take the time.
    images = []
    for data in _jpegs():
        header = probe(data)
        assert isinstance(header, Probe)
        images.append((data, header))
    shards = []
    number = 0
    for s in range(num_shards):
        path = folder / f"train-{s:06d}.tar"
        with WebDatasetWriter(str(path)) as writer:
            written_bytes = 0
            while written_bytes < shard_bytes:
                chosen = number % len(images)
                image, header = images[chosen]
                key = f"{number:07d}"
                label = number % 1000
                writer.add(key, image, header, label=label)
                # With the tar's headers of the image and of its label.
                written_bytes += len(image) + 1024
                number += 1
            shard = writer.close()
        shards.append(shard)
    write_dataset(str(folder), shards=shards, name="bench", container="webdataset")
    return number


def _jpegs() -> list[bytes]:
    random = np.random.default_rng(0)
    jpegs = []
    for _ in range(_DISTINCT_IMAGES):
        # Smooth areas with noise on top: a file of about a photograph's size.
        small = random.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        small_image = Image.fromarray(small)
        smooth = small_image.resize((500, 375), Image.Resampling.BICUBIC)
        pixels = np.asarray(smooth, dtype=np.int16)
        noise = random.normal(0, 11, pixels.shape)
        clipped = np.clip(pixels + noise, 0, 255)
        noisy = clipped.astype(np.uint8)
        image = Image.fromarray(noisy)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=92)
        data = buffer.getvalue()
        jpegs.append(data)
    return jpegs
