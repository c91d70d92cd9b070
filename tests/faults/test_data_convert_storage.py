"""Converting to and from object storage and the web on a bad day."""

from __future__ import annotations

import datetime
import http.server
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline import storage
from pipeline.convert.conversion import convert
from pipeline.convert.settings import ConvertSettings
from pipeline.dataset import open_dataset
from tests.limits import HANG_S

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SETTINGS = ConvertSettings(samples_per_shard=4)


@pytest.fixture
def source(make_class_folder: Callable[..., Path], tmp_path: Path) -> Path:
    return make_class_folder(num_classes=2, per_class=6, root=tmp_path / "src")


@pytest.mark.remote
@pytest.mark.slow
def test_bursts_of_503_from_the_target_change_nothing(
    source: Path, tmp_path: Path, s3_bucket, through_proxy
) -> None:
    here = convert(str(source), str(tmp_path / "dst"), SETTINGS, workers=1)
    proxy = through_proxy()
    for match in (r"000000\.tar", r"_parts/", r"dataset\.json"):
        proxy.plan("503", times=2, match=match, method="PUT")
    assert (
        convert(str(source), storage.join(s3_bucket, "dst"), SETTINGS, workers=1)
        == here
    )
    assert proxy.done["503"] == 6
    for file in storage.list_files(storage.join(s3_bucket, "dst"), recursive=True):
        assert (
            storage.read_bytes(file.uri) == (tmp_path / "dst" / file.name).read_bytes()
        )


# -------------------------------------------------------------------------------------------- https


class _Ranges(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        start, end = int(asked[1]), min(int(asked[2]), path.stat().st_size - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end - start + 1))
        self.end_headers()
        self.wfile.write(data[start : end + 1])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[Path, str, Path]]:
    """Give a folder, the https:// address that serves it, and the certificate to trust."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    day = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    certificate = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number()
        )
        .not_valid_before(day)
        .not_valid_after(datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path / "server.pem"
    encoding = serialization.Encoding.PEM
    secret = key.private_bytes(
        encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(secret + certificate.public_bytes(encoding))
    folder = tmp_path / "web"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *args: _Ranges(*args, directory=str(folder))
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    yield folder, f"https://localhost:{server.server_address[1]}", pem
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.remote
@pytest.mark.slow
def test_tars_parquet_and_lists_are_read_over_https(
    source: Path, tmp_path: Path, web
) -> None:
    import os
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, address, pem = web
    paths = sorted(source.rglob("*.jpg"))
    with tarfile.open(folder / "images.tar", "w") as archive:
        for path in paths:
            archive.add(path, str(path.relative_to(source)))
    images = [
        {"bytes": path.read_bytes(), "path": f"{path.parent.name}-{path.name}"}
        for path in paths
    ]
    pq.write_table(
        pa.table({"image": images, "label": [p.parent.name for p in paths]}),
        folder / "images.parquet",
    )
    (folder / "one.jpg").write_bytes(paths[0].read_bytes())
    (folder / "list.csv").write_text(
        f"url,label\none.jpg,a\n{address}/one.jpg?signature=hidden,b\n{address}/gone.jpg,a\n"
    )
    for name, count in (("images.tar", 12), ("images.parquet", 12), ("list.csv", 2)):
        command = [
            sys.executable,
            "-m",
            "pipeline.convert",
            f"{address}/{name}",
            str(tmp_path / name),
        ]
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**os.environ, "SSL_CERT_FILE": str(pem)},
            capture_output=True,
            text=True,
            check=False,
            timeout=HANG_S,
        )
        assert done.returncode == 0, done.stderr
        dataset = open_dataset(str(tmp_path / name))
        assert dataset.info.num_samples == count
        assert len(set(dataset.lookup(np.arange(count)).labels_B.tolist())) == 2
    written = b"".join(path.read_bytes() for path in (tmp_path / "list.csv").iterdir())
    assert b"hidden" not in written
    assert pq.read_table(tmp_path / "list.csv" / "rejected.parquet").num_rows == 1
