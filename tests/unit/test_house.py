"""The house keeps its rules: one root, arrows, pure modules, clean text, strict markers, an honest
set-up script."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from importlib import metadata
from io import BytesIO
from pathlib import Path

import psutil
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "model", "train", "deploy")
SETTINGS = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
CONTRACTS = {
    contract["name"]: contract
    for contract in SETTINGS["tool"]["importlinter"]["contracts"]
}
PURE_CONTRACT = "What lays out a run needs neither torch nor DALI"


def run_python(code: str, *, cwd: Path, path: str = "") -> str:
    """Run code in a fresh interpreter and give what it printed."""
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ----------------------------------------------------------------------------------------- packages


def test_packages_come_from_the_repository_wherever_they_are_imported(
    tmp_path: Path,
) -> None:
    code = f"""
        import json
        from importlib.util import find_spec
        print(json.dumps([find_spec(name).origin for name in {PACKAGES}]))
    """
    origins = json.loads(run_python(code, cwd=tmp_path))
    assert [Path(origin) for origin in origins] == [
        REPOSITORY / name / "__init__.py" for name in PACKAGES
    ]


def test_editable_install_is_one_plain_path() -> None:
    files = [
        file for file in metadata.files("maelstrom") or [] if file.suffix == ".pth"
    ]
    assert len(files) == 1
    lines = set(Path(str(files[0].locate())).read_text().split("\n")) - {""}
    assert lines == {str(REPOSITORY)}  # an import hook would start with `import`


def test_distribution_lists_every_package_and_cannot_be_uploaded() -> None:
    assert SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(
        PACKAGES
    )
    assert "Private :: Do Not Upload" in SETTINGS["project"]["classifiers"]
    found = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")}
    assert found == set(PACKAGES)


def test_torch_is_the_pinned_one() -> None:
    pinned = re.search(
        r"^torch==(\S+)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE
    )
    assert pinned
    assert metadata.version("torch").split("+")[0] == pinned[1]


# ------------------------------------------------------------------------------------------- arrows


def copy_packages(destination: Path) -> None:
    for package in PACKAGES:
        for source in (REPOSITORY / package).rglob("*.py"):
            target = destination / source.relative_to(REPOSITORY)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    shutil.copyfile(REPOSITORY / "pyproject.toml", destination / "pyproject.toml")


def lint_imports(cwd: Path) -> tuple[int, str]:
    command = [
        str(Path(sys.executable).with_name("lint-imports")),
        "--no-cache",
        "--no-logo",
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


# For each contract: a file that breaks it, and the arrow that must be named.
VIOLATIONS = {
    "Arrows: deploy -> train -> pipeline, train -> model": (
        "pipeline/verify.py",
        "import model.config",
        "pipeline.verify -> model.config",
    ),
    "pipeline: each stage sees only the stages below it": (
        "pipeline/formats/tar.py",
        "import pipeline.dataset.info",
        "pipeline.formats.tar -> pipeline.dataset.info",
    ),
    "train: each part of a run sees only the parts below it": (
        "train/process/lease.py",
        "import train.loop.guard",
        "train.process.lease -> train.loop.guard",
    ),
    "model: an encoder that knows no objective": (
        "model/vit.py",
        "import model.objectives.mae",
        "model.vit -> model.objectives.mae",
    ),
    "Decoders do not know their siblings": (
        "pipeline/decoders/turbo.py",
        "import pipeline.decoders.dali",
        "pipeline.decoders.turbo -> pipeline.decoders.dali",
    ),
    "Sources do not know their siblings": (
        "pipeline/sources/folder.py",
        "import pipeline.sources.tar",
        "pipeline.sources.folder -> pipeline.sources.tar",
    ),
    "Formats: the choice, reader and writer of each, its layout": (
        "pipeline/formats/beton.py",
        "import pipeline.formats.webdataset",
        "pipeline.formats.beton -> pipeline.formats.webdataset",
    ),
    "Only the engine imports deepspeed": (
        "train/report/meter.py",
        "import deepspeed",
        "train.report.meter -> deepspeed",
    ),
    "Only the storage door imports fsspec": (
        "train/report/drawing.py",
        "from fsspec import open",
        "train.report.drawing -> fsspec",
    ),
    "What lays out a run needs neither torch nor DALI": (
        "train/settings/size.py",
        "import train.engine.build",
        "train.settings.size -> train.engine.build",
    ),
}
EXHAUSTIVE = ("pipeline", "train", "model", "pipeline.sources", "pipeline.formats")


def test_arrows_hold_and_every_contract_catches_what_it_forbids(tmp_path: Path) -> None:
    copy_packages(tmp_path)
    returncode, output = lint_imports(tmp_path)
    assert returncode == 0, output
    assert VIOLATIONS.keys() == CONTRACTS.keys()

    for file, line, _ in VIOLATIONS.values():
        with (tmp_path / file).open("a") as out:
            out.write(f"\n\ndef stray() -> None:\n    {line}\n")
    returncode, output = lint_imports(tmp_path)
    assert returncode == 1
    for name, (_, _, arrow) in VIOLATIONS.items():
        assert f"{name} BROKEN" in output
        assert arrow in output


@pytest.mark.slow
@pytest.mark.parametrize("package", EXHAUSTIVE)
def test_a_new_file_must_be_given_a_floor(tmp_path: Path, package: str) -> None:
    copy_packages(tmp_path)
    (tmp_path / package.replace(".", "/") / "stray.py").write_text("STRAY = 1\n")
    returncode, output = lint_imports(tmp_path)
    assert returncode == 1
    assert f"{package}.stray" in output


def imports_of(path: Path) -> Iterator[str]:
    """Yield what a file imports, anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_import_circle_between_files() -> None:
    files = {}
    for package in PACKAGES:
        for path in (REPOSITORY / package).rglob("*.py"):
            files[
                ".".join(
                    path.relative_to(REPOSITORY).with_suffix("").parts
                ).removesuffix(".__init__")
            ] = path
    faces = {name for name, path in files.items() if path.name == "__init__.py"}
    arrows: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for imported in imports_of(path):
            target = imported if imported in files else imported.rpartition(".")[0]
            # A folder's face only hands on what lies in its own folder.
            inside = target in faces and f"{name}.".startswith(f"{target}.")
            if target in files and target != name and not inside:
                targets.add(target)
        arrows[name] = targets
    TopologicalSorter(arrows).prepare()  # raises CycleError, which names the circle


def test_no_folder_holds_more_than_twelve_files() -> None:
    for package in PACKAGES:
        for folder in [REPOSITORY / package, *(REPOSITORY / package).rglob("*/")]:
            files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
            assert len(files) <= 12, folder


def pure_modules() -> Iterator[str]:
    for name in CONTRACTS[PURE_CONTRACT]["source_modules"]:
        folder = REPOSITORY / name.replace(".", "/")
        if not folder.is_dir():
            yield name
            continue
        for path in sorted(folder.rglob("*.py")):
            yield ".".join(
                path.relative_to(REPOSITORY).with_suffix("").parts
            ).removesuffix(".__init__")


def test_pure_modules_load_no_torch(tmp_path: Path) -> None:
    modules = list(pure_modules())
    assert {"pipeline.sampling.order", "pipeline.config", "train.config"} <= set(
        modules
    )
    code = f"""
        import importlib, sys
        for name in {modules}:
            importlib.import_module(name)
            heavy = {{"torch", "nvidia", "deepspeed", "numba", "transformers"}} & sys.modules.keys()
            assert not heavy, f"{{name}} imports {{heavy}}"
    """
    run_python(code, cwd=tmp_path)


# --------------------------------------------------------------------------------------------- text


def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "-z"]
    names = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    files = [REPOSITORY / name for name in names.split("\0") if name]
    return [
        path for path in files if path.is_file()
    ]  # a file may be deleted and not yet committed


@pytest.mark.parametrize(
    ("what", "pattern"),
    [
        ("a path of one machine", rb"(?<![\w.])/(?:work|root)/\w"),
        ("a note to finish later", rb"\b(?:TO" rb"DO|FIX" rb"ME|XX" rb"X)\b"),
        ("a merge conflict", rb"^(?:<{7}|>{7}) "),
        ("a DOS line end", rb"\r\n"),
    ],
)
def test_text_speaks_of_the_project_only(what: str, pattern: bytes) -> None:
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" in data or path.suffix in {".ipynb", ".svg"}:
            continue
        for match in re.finditer(pattern, data, re.MULTILINE):
            line = data.count(b"\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(REPOSITORY)}:{line}")
    assert not found, f"{what}: {found}"


def test_no_catch_all_files_and_no_packages_below_tests() -> None:
    for path in tracked_files():
        assert path.stem not in {"utils", "util", "misc", "common", "helpers"}, path
    assert not list((REPOSITORY / "tests").rglob("__init__.py"))


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


# ------------------------------------------------------------------------------- tests of the tests


@pytest.fixture(scope="module")
def inner_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run pytest with the project's settings and fixtures on tests that break the rules; give
    folder and output."""
    folder = tmp_path_factory.mktemp("inner")
    conftest = (REPOSITORY / "tests/conftest.py").read_text()
    assert "CHILD_EXIT_LIMIT_S = EXIT_S" in conftest
    (folder / "conftest.py").write_text(
        conftest.replace("CHILD_EXIT_LIMIT_S = EXIT_S", "CHILD_EXIT_LIMIT_S = 0.2")
    )
    (folder / "test_marker.py").write_text(
        "import pytest\n@pytest.mark.gpus\ndef test_a(): pass\n"
    )
    text = """
        import subprocess, sys
        from pathlib import Path

        def test_stray():
            child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
            Path(__file__).with_name("pid").write_text(str(child.pid))

        def test_tidy():
            subprocess.run([sys.executable, "-c", ""], check=True)
    """
    (folder / "test_processes.py").write_text(textwrap.dedent(text))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(REPOSITORY / "pyproject.toml"),
        "-p",
        "no:cacheprovider",
    ]
    command += [
        "--continue-on-collection-errors",
        "--rootdir",
        str(folder),
        str(folder),
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    return folder, done.stdout


def test_an_unknown_marker_is_an_error(inner_run: tuple[Path, str]) -> None:
    assert "'gpus' not found in `markers`" in inner_run[1]


def test_a_process_left_behind_fails_the_test_and_is_ended(
    inner_run: tuple[Path, str],
) -> None:
    folder, output = inner_run
    assert "processes left behind" in output
    assert "2 passed, 2 errors" in output
    assert not psutil.pid_exists(int((folder / "pid").read_text()))


def test_photos_are_fifteen_real_photographs(photos: dict[str, bytes]) -> None:
    assert len(photos) == 15
    for data in photos.values():
        with Image.open(BytesIO(data)) as image:
            assert image.format == "JPEG"
            assert min(image.size) >= 300


def test_class_folder_holds_every_class_and_varied_sizes(class_folder: Path) -> None:
    files = sorted(class_folder.rglob("*.jpg"))
    assert len(files) == 32
    assert len({path.parent.name for path in files}) == 4
    sizes = set()
    for path in files:
        with Image.open(path) as image:
            sizes.add(image.size)
    assert len(sizes) >= 4


def test_make_class_folder_refuses_more_crops_than_a_photograph_holds(
    make_class_folder: Callable[..., Path],
) -> None:
    with pytest.raises(ValueError, match="disjoint crops"):
        make_class_folder(num_classes=1, per_class=1000)


@pytest.mark.remote
def test_s3_server_stores_and_serves(s3_bucket: str) -> None:
    import boto3

    bucket = s3_bucket.removeprefix("s3://")
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="a", Body=b"0123456789")
    assert (
        client.get_object(Bucket=bucket, Key="a", Range="bytes=2-4")["Body"].read()
        == b"234"
    )


# ------------------------------------------------------------------------------------ set-up script

SETUP_TOOLS = (
    "bash",
    "cat",
    "cut",
    "dirname",
    "env",
    "flock",
    "grep",
    "head",
    "id",
    "ls",
    "mktemp",
)
SETUP_TOOLS += ("paste", "rm", "sed", "sha256sum", "tr")


@pytest.fixture
def bare_root(tmp_path: Path) -> Path:
    """Give a copy of what the set-up script reads, beside a folder `bin` that holds coreutils and
    nothing else."""
    root = tmp_path / "root"
    (root / "deploy").mkdir(parents=True)
    for name in ("deploy/setup.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, root / name)
    (tmp_path / "bin").mkdir()
    for tool in SETUP_TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (tmp_path / "bin" / tool).symlink_to(found)
    return root


def run_setup(root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    # No `make`, no compiler, no apt-get on PATH: what gets past the check that is meant can install
    # nothing.
    environment = {
        "PATH": str(root.parent / "bin"),
        "HOME": str(root.parent),
        **environment,
    }
    command = [str(root / "deploy/setup.sh")]
    return subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def base_python() -> str:
    return str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")


def test_setup_without_a_python_says_which_are_needed(bare_root: Path) -> None:
    done = run_setup(bare_root)
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12 found" in done.stderr


def test_setup_refuses_a_python_that_does_not_run(bare_root: Path) -> None:
    done = run_setup(bare_root, PYTHON="/bin/false")
    assert done.returncode == 2
    assert "PYTHON=/bin/false does not run" in done.stderr


def test_setup_names_missing_packages_before_it_changes_anything(
    bare_root: Path,
) -> None:
    done = run_setup(bare_root, PYTHON=base_python())
    assert done.returncode == 2
    assert "g++" in done.stderr
    assert not (bare_root / ".venv").exists()


def test_setup_without_ffcv_asks_for_no_opencv(bare_root: Path) -> None:
    done = run_setup(bare_root, PYTHON=base_python(), EXTRAS="dali,s3")
    assert done.returncode == 2
    assert "g++" in done.stderr
    assert "pkg-config" not in done.stderr


def test_setup_does_nothing_where_the_stamp_fits_and_everything_where_it_does_not(
    bare_root: Path,
) -> None:
    binaries = bare_root / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(base_python())
    (bare_root / ".venv/pyvenv.cfg").write_text("version = 3.11.7\n")
    fingerprint = subprocess.run(
        [
            "bash",
            "-c",
            f"source <(sed '/^main /d' {bare_root}/deploy/setup.sh); ROOT={bare_root}; "
            "VENV=$ROOT/.venv; fingerprint",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (bare_root / ".venv/.setup-stamp").write_text(fingerprint)
    done = run_setup(bare_root)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    for changed in ("pyproject.toml", "constraints.txt", "deploy/setup.sh"):
        before = (bare_root / changed).read_text()
        (bare_root / changed).write_text(before + "\n# changed\n")
        assert run_setup(bare_root).returncode == 2, changed
        (bare_root / changed).write_text(before)
    assert run_setup(bare_root, EXTRAS="dali").returncode == 2
    assert run_setup(bare_root).returncode == 0


# --------------------------------------------------------------------------------------------- make


def make_targets() -> set[str]:
    return set(
        re.findall(
            r"^([a-z][a-z-]*):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE
        )
    )


def test_make_lists_every_target_and_promises_only_modules_that_exist() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    done = subprocess.run(
        ["make", "help"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    for target in make_targets():
        assert f"make {target} " in done.stdout
    for module in re.findall(
        r"\$\(PY\) -m ((?:pipeline|train|deploy)(?:\.\w+)+)", text
    ):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), (
            module
        )
