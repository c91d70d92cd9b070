"""Shared fixtures: real photographs, class folders cut from them, S3 on loopback, and a guard on
processes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType

import psutil
import pytest
from hypothesis import HealthCheck, settings

from tests.launch import SERVER, find_free_port
from tests.limits import EXIT_S, TEST_S, wait_until

REPOSITORY = Path(__file__).resolve().parent.parent

PHOTO_FILES = (
    *(
        f"skimage/data/{name}"
        for name in (
            "astronaut.png",
            "chelsea.png",
            "coffee.png",
            "motorcycle_left.png",
        )
    ),
    *(
        f"skimage/data/{name}"
        for name in ("rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png")
    ),
    *(
        f"skimage/data/{name}"
        for name in ("brick.png", "camera.png", "coins.png", "grass.png", "gravel.png")
    ),
    *(f"sklearn/datasets/images/{name}" for name in ("china.jpg", "flower.jpg")),
)
"""Photographs shipped in the wheels of scikit-image and scikit-learn, by name: the folders also
hold text and logos."""

CHILD_EXIT_LIMIT_S = EXIT_S
MUCH_BYTES = 200_000_000
"""Growth of this process over one file of tests that is not left to the allocator."""

# Compiling the sources of torch and DeepSpeed takes five seconds of CPU time, and the tests start
# hundreds of processes that import them. If this machine does not keep bytecode beside the sources
# (the packages are installed without it), keep it in the environment's own folder.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(sys.prefix) / "pycache")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# torch's compiler keys its graphs by neither the processor nor ATEN_CPU_CAPABILITY: code that was
# generated for AVX-512 is taken for AVX2 too, where it skips half of each array, and the other way
# round it writes past the end. Every session generates its own; xdist's workers share one folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    atexit.register(
        shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True
    )

os.environ.setdefault("MPLBACKEND", "Agg")
settings.register_profile(
    "local", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "ci", parent=settings.get_profile("local"), derandomize=True, print_blob=True
)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test its limit, and skip what this machine cannot run; torch is imported only if a
    GPU test was collected."""
    for item in items:
        item.add_marker(pytest.mark.timeout(TEST_S))
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip_marked(items, marker="gpu", reason="needs a CUDA device")
    if not (shutil.which("slurmctld") and shutil.which("slurmd")):
        _skip_marked(items, marker="slurm", reason="needs slurmctld and slurmd")


def _skip_marked(items: list[pytest.Item], *, marker: str, reason: str) -> None:
    for item in items:
        # keywords also hold folder names: tests/gpu would match without asking for the marker
        # itself.
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


# -------------------------------------------------------------------------------------- photographs


@pytest.fixture(scope="session")
def photo_paths() -> dict[str, Path]:
    """Give the path of each real photograph, by stem, as installed (PNG and JPEG, colour and
    grey)."""
    paths: dict[str, Path] = {}
    for name in PHOTO_FILES:
        package, _, inner = name.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            pytest.fail(f"{package} is not installed; run `make setup` (extra `demo`)")
        path = Path(spec.origin).parent / inner
        paths[path.stem] = path
    return paths


@pytest.fixture(scope="session")
def photos(photo_paths: dict[str, Path]) -> MappingProxyType[str, bytes]:
    """Give 15 real photographs as JPEG bytes, by stem; grey ones stay grey. Some 0.4 s, once a
    session."""
    from PIL import Image

    encoded: dict[str, bytes] = {}
    for stem, path in photo_paths.items():
        if path.suffix == ".jpg":
            encoded[stem] = path.read_bytes()
            continue
        with Image.open(path) as image:
            mode = "L" if image.mode in ("L", "1", "I", "I;16") else "RGB"
            encoded[stem] = encode_jpeg(image.convert(mode))
    return MappingProxyType(encoded)


def encode_jpeg(image: object, *, quality: int = 90) -> bytes:
    """Encode a PIL image as JPEG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)  # type: ignore[attr-defined]
    return buffer.getvalue()


@pytest.fixture(scope="session")
def make_class_folder(
    photo_paths: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Give a function that writes `<root>/<class>/<nnn>.jpg`: disjoint crops, the class is the
    source photograph.

    The function takes `num_classes` (at most 15), `per_class`, `size_px` (shorter side; widths vary
    by up to half, so that sizes differ as they do in real data) and optionally `root`; it returns
    the root.
    """
    from PIL import Image

    def make(
        *,
        num_classes: int = 4,
        per_class: int = 8,
        size_px: int = 64,
        root: Path | None = None,
    ) -> Path:
        root = root or tmp_path_factory.mktemp("classes")
        for stem, path in list(photo_paths.items())[:num_classes]:
            folder = root / stem
            folder.mkdir(parents=True)
            with Image.open(path) as source:
                image = source.convert("RGB")
            for index in range(per_class):
                width = size_px + (index * 7) % (size_px // 2 + 1)
                per_row = image.width // (size_px + size_px // 2)
                left = (index % per_row) * (size_px + size_px // 2)
                top = (index // per_row) * size_px
                if top + size_px > image.height:
                    raise ValueError(
                        f"{stem} holds no {per_class} disjoint crops of {size_px} px"
                    )
                crop = image.crop((left, top, left + width, top + size_px))
                (folder / f"{index:03d}.jpg").write_bytes(encode_jpeg(crop))
        return root

    return make


@pytest.fixture(scope="session")
def class_folder(make_class_folder: Callable[..., Path]) -> Path:
    """Give a read-only folder of 4 classes x 8 JPEG crops, 64 px high. Shared by the session: do
    not write into it."""
    return make_class_folder()


# ----------------------------------------------------------------------------------- object storage


@dataclasses.dataclass(frozen=True)
class S3Server:
    """A moto server on loopback."""

    endpoint_url: str
    bucket: str
    pid: int

    @property
    def uri(self) -> str:
        """The session's bucket as `s3://name`."""
        return f"s3://{self.bucket}"


_session_pids: set[int] = set()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Run moto's S3 on a free loopback port, with AWS_* set for this process and its children, and
    one bucket made.

    moto imports for seconds and its ranged reads get slow with large objects: mark tests `remote`,
    keep shards small.
    """
    import boto3

    port = find_free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(sys.executable).with_name("moto_server")),
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryFile() as log:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ACCESS_KEY_ID", "test-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("NO_PROXY", "no_proxy"):
            patch.setenv(name, "127.0.0.1,localhost")
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        _session_pids.add(server.pid)
        try:
            _wait_until_answers(url, server=server, log=log)
            bucket = "maelstrom-tests"
            boto3.client("s3").create_bucket(Bucket=bucket)
            yield S3Server(endpoint_url=url, bucket=bucket, pid=server.pid)
        finally:
            server.terminate()
            try:
                server.wait(timeout=CHILD_EXIT_LIMIT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            _session_pids.discard(server.pid)


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Iterator[str]:
    """Make a fresh bucket on the session's server for one test; give it as `s3://name`, empty it
    afterwards."""
    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    bucket = boto3.resource("s3").Bucket(name)
    bucket.create()
    yield f"s3://{name}"
    bucket.objects.all().delete()
    bucket.delete()


def _wait_until_answers(
    url: str, *, server: subprocess.Popen[bytes], log: io.BufferedRandom
) -> None:
    def answers() -> bool:
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    try:
        wait_until(
            answers,
            what=f"an answer on {url}",
            still_possible=lambda: server.poll() is None,
        )
    except AssertionError as error:
        log.seek(0)
        said = log.read().decode(errors="replace")
        pytest.fail(f"moto_server (rc {server.poll()}): {error}\n{said}")


# ---------------------------------------------------------------------------------------- processes


@pytest.fixture(autouse=True, scope="module")
def memory_given_back() -> Iterator[None]:
    """Give freed memory back after a file that took much: a model of several GB would otherwise
    stay resident in the allocator for the rest of the session."""
    process = psutil.Process()
    before_bytes = process.memory_info().rss
    yield
    # Not after every file: walking over all objects of torch takes a third of a second.
    if process.memory_info().rss - before_bytes < MUCH_BYTES:
        return
    gc.collect()
    with contextlib.suppress(AttributeError):  # musl and macOS have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def no_process_left_behind() -> Iterator[None]:
    """Fail a test that leaves a child process running, and end that process: an orphan trains on
    for ever."""
    before = _descendants(os.getpid())
    yield
    left = [
        child
        for pid in _descendants(os.getpid()) - before
        if (child := _process(pid)) and not _may_stay(child)
    ]
    if not left:
        return
    _, alive = psutil.wait_procs(left, timeout=CHILD_EXIT_LIMIT_S)
    descriptions = [
        f"{child.pid}: {_command_line(child)}" for child in alive if _is_running(child)
    ]
    for child in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(alive, timeout=CHILD_EXIT_LIMIT_S)
    if descriptions:
        pytest.fail(
            "processes left behind (now killed):\n" + "\n".join(descriptions),
            pytrace=False,
        )


def _descendants(pid: int) -> set[int]:
    # psutil walks every process of the machine, milliseconds a test; Linux keeps the list of
    # children ready.
    if not Path(f"/proc/{pid}/task/{pid}/children").exists():
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        for task in Path(f"/proc/{waiting.pop()}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                children = {int(word) for word in task.read_text().split()} - found
                found |= children
                waiting += children
    return found


def _process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _may_stay(child: psutil.Process) -> bool:
    # Python keeps one resource tracker and one fork server for the life of the process.
    command = _command_line(child)
    return (
        child.pid in {*_session_pids, SERVER.pid}
        or "resource_tracker" in command
        or "multiprocessing.forkserver" in command
    )


def _command_line(child: psutil.Process) -> str:
    try:
        return " ".join(child.cmdline())
    except psutil.Error:
        return ""


def _is_running(child: psutil.Process) -> bool:
    try:
        return bool(child.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


# ----------------------------------------------------------------------------------------- datasets


@pytest.fixture(scope="session")
def crops(photo_paths: dict[str, Path]) -> list[bytes]:
    """Give 60 JPEG crops of real photographs, of different sizes from 60 to 131 px."""
    from PIL import Image

    found = []
    for number, path in enumerate(photo_paths.values()):
        with Image.open(path) as source:
            image = source.convert("RGB")
        for part in range(4):
            index = number * 4 + part
            width, height = 60 + index * 37 % 72, 60 + index * 53 % 72
            left, top = (
                part * 137 % (image.width - width),
                part * 89 % (image.height - height),
            )
            found.append(
                encode_jpeg(image.crop((left, top, left + width, top + height)))
            )
    return found


@pytest.fixture
def make_dataset(crops: list[bytes], tmp_path: Path) -> Callable[..., str]:
    """Give a function that writes WebDataset shards of the crops and returns their folder.

    The function takes `shard_sizes`, `uri` (a folder of the test's own if not given) and `replace`:
    bytes that are stored in place of a sample's image, by sample id, while the manifest goes on
    telling of the image.
    """
    from pipeline import storage
    from pipeline.dataset.writer import write_dataset
    from pipeline.formats.webdataset_writer import WebDatasetWriter
    from pipeline.images.header import probe

    def make(
        shard_sizes: tuple[int, ...] = (13, 17, 11, 19),
        *,
        uri: str = "",
        replace: dict[int, bytes] | None = None,
    ) -> str:
        folder = uri or str(tmp_path / "dataset")
        shards, sample_id = [], 0
        for number, size in enumerate(shard_sizes):
            with WebDatasetWriter(
                storage.join(folder, f"train-{number:06d}.tar")
            ) as writer:
                for _ in range(size):
                    image = crops[sample_id % len(crops)]
                    stored = (replace or {}).get(sample_id, image)
                    writer.add(
                        f"{sample_id:06d}", stored, probe(image), label=sample_id % 15
                    )
                    sample_id += 1
                shards.append(writer.close())
        write_dataset(folder, shards=shards, name="crops", container="webdataset")
        return folder

    return make
