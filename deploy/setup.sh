#!/usr/bin/env bash
# Make .venv: everything that `make demo`, `make test`, CI and the container image need. Safe to run again at any time.
#
#   deploy/setup.sh                          from anywhere; a second run does nothing in well under a second
#   EXTRAS=dali,s3 deploy/setup.sh           fewer optional parts (default: dali,ffcv,s3,ray,demo,dev)
#   EXTRAS=dali,ffcv,s3,ray,demo,dev,shm ...     also DeepSpeed's shared-memory op for CPUs, built in (see below)
#   PYTHON=/opt/python3.12/bin/python3       the interpreter (default: the first of python3.11, python3.12, python3 that fits)
#   TORCH_INDEX_URL=https://...              a package index for torch alone, such as one with CPU-only builds
#
# Exit codes: 0 done, 2 something is missing that you must install, 76 a download or a build failed (run it again).
set -euo pipefail

EXTRAS="${EXTRAS-dali,ffcv,s3,ray,demo,dev}"
FFCV_VERSION=1.0.2
EXIT_CONFIG=2
EXIT_INFRASTRUCTURE=76

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$ROOT/.venv"
STAMP="$VENV/.setup-stamp"
PY="$VENV/bin/python"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0 PYTHONNOUSERSITE=1

say() { printf 'setup: %3d s  %s\n' "$SECONDS" "$*" >&2; }
die() {
    local code="$1"
    shift
    printf 'setup: error: %s\n' "$@" >&2
    exit "$code"
}
# `shm` is a build option of DeepSpeed, not an extra that pip knows.
python_extras() { printf '%s' "$EXTRAS" | tr ',' '\n' | grep -vx shm | paste -sd, -; }
wants() { case ",$EXTRAS," in *",$1,"*) return 0 ;; *) return 1 ;; esac }

# What the installation was made from. The folder is part of it: a virtual environment cannot be moved.
fingerprint() {
    {
        printf '%s\n' "$ROOT" "$EXTRAS"
        sed -n 's/^version *= *//p' "$VENV/pyvenv.cfg"
        cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" "$ROOT/deploy/setup.sh"
    } | sha256sum | cut -d' ' -f1
}
is_current() { [ -x "$PY" ] && [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; }

# ------------------------------------------------------------------------------------------------ Python

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        fits "$PYTHON" || die $EXIT_CONFIG "PYTHON=$PYTHON does not run or is not Python 3.11 or 3.12."
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3; do
        if fits "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die $EXIT_CONFIG "no Python 3.11 or 3.12 found (python3 is $(python3 -V 2>&1 || true))." \
        "Install one (Debian 12: apt-get install -y python3 python3-venv) or name one: PYTHON=/path/to/python3.11"
}

make_venv() {
    local python="$1"
    if [ -e "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die $EXIT_CONFIG "$VENV exists and is no virtual environment; move it away."
    fi
    if [ -f "$VENV/pyvenv.cfg" ] && fits "$PY" && "$PY" -m pip --version >/dev/null 2>&1 &&
        { ! grep -q '^command' "$VENV/pyvenv.cfg" || grep -q "^command.* $VENV\$" "$VENV/pyvenv.cfg"; }; then
        return
    fi
    say "creating .venv with $("$python" -V)"
    "$python" -m venv --clear "$VENV" || die $EXIT_INFRASTRUCTURE "could not create $VENV with $python."
}

# ------------------------------------------------------------------------------------------------ Debian packages

# Print the Debian package of everything that is needed and absent. Tests for the thing, not for the package:
# other distributions and hand-made installations are fine.
missing_packages() {
    local python="$1"
    command -v git >/dev/null || echo git
    command -v make >/dev/null || echo make
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$(debian_python "$python")-venv"
    command -v g++ >/dev/null || echo g++
    # torch's extension builder looks for ninja on PATH, where an unactivated .venv is not.
    command -v ninja >/dev/null || echo ninja-build
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || echo "$(debian_python "$python")-dev"
    wants ffcv || return 0
    command -v pkg-config >/dev/null || echo pkg-config
    [ -f /usr/include/opencv4/opencv2/imgproc.hpp ] || pkg-config --exists opencv4 2>/dev/null || echo libopencv-imgproc-dev
    pkg-config --exists libturbojpeg 2>/dev/null || [ -f /usr/include/turbojpeg.h ] || echo libturbojpeg0-dev
}
debian_python() { "$1" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'; }

install_packages() {
    local missing
    missing="$(missing_packages "$1" | tr '\n' ' ')"
    [ -n "${missing// /}" ] || return 0
    if ! command -v apt-get >/dev/null; then
        die $EXIT_CONFIG "these are missing (Debian's names): $missing" "Install them with this system's package manager."
    elif [ "$(id -u)" -ne 0 ]; then
        die $EXIT_CONFIG "these packages are missing. Run this, then the same command again:" \
            "  sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing"
    fi
    say "installing Debian packages: $missing"
    export DEBIAN_FRONTEND=noninteractive
    # shellcheck disable=SC2086  # one word a package
    { apt-get update -qq -o Acquire::Retries=3 &&
        apt-get install -y -qq --no-install-recommends -o Acquire::Retries=3 $missing >/dev/null; } ||
        die $EXIT_INFRASTRUCTURE "apt-get could not install: $missing"
}

# ------------------------------------------------------------------------------------------------ Python packages

pip_install() {
    "$PY" -m pip install -qq --no-compile --constraint "$ROOT/constraints.txt" "$@" ||
        die $EXIT_INFRASTRUCTURE "pip could not install: $*" "Nothing is lost: run the same command again."
}
constraint_of() { sed -n "s/^$1==\([^ ;#]*\).*/\1/p" "$ROOT/constraints.txt"; }
# The installed version without its local part: 2.13.0 for 2.13.0+cpu. Empty when absent.
installed_version() {
    "$PY" -c 'import sys
from importlib import metadata
try:
    print(metadata.version(sys.argv[1]).split("+")[0])
except metadata.PackageNotFoundError:
    pass' "$1"
}

# First and alone: several packages would otherwise bring another torch, gigabytes of it.
install_torch() {
    local wanted
    wanted="$(constraint_of torch)"
    [ "$(installed_version torch)" != "$wanted" ] || return 0
    say "installing torch $wanted"
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        pip_install --index-url "$TORCH_INDEX_URL" "torch==$wanted"
    else
        pip_install "torch==$wanted"
    fi
}

# Build a source package against this environment and install it without asking for its dependencies.
# No pip cache: it would serve a wheel that was built with other settings.
build_and_install() {
    local requirement="$1" wheels
    wheels="$(mktemp -d)"
    "$PY" -m pip wheel -qq --no-cache-dir --no-deps --no-build-isolation --wheel-dir "$wheels" "$requirement" ||
        { rm -rf "$wheels"; die $EXIT_INFRASTRUCTURE "could not build $requirement (see above)."; }
    "$PY" -m pip install -qq --no-deps --no-compile --force-reinstall "$wheels"/*.whl ||
        { rm -rf "$wheels"; die $EXIT_INFRASTRUCTURE "could not install $requirement."; }
    rm -rf "$wheels"
}

# DeepSpeed compiles a shared-memory all-reduce at the first init_distributed on a CPU, half a minute on every machine,
# for inference alone. The engine turns it off, so it is built in only on request: 80-100 s of two cores.
# On a CUDA device DeepSpeed does not look for this op, so the same wheel serves there.
install_deepspeed_op() {
    local wanted
    wants shm || return 0
    wanted="$(constraint_of deepspeed)"
    if deepspeed_op_is_built; then return 0; fi
    say "building deepspeed $wanted with its shared-memory op"
    pip_install setuptools wheel
    DS_ACCELERATOR=cpu DS_BUILD_SHM_COMM=1 build_and_install "deepspeed==$wanted"
    deepspeed_op_is_built || die $EXIT_INFRASTRUCTURE "deepspeed was built without its shared-memory op."
}
# DeepSpeed uses the op only where it was built against the torch that runs; otherwise it compiles again.
deepspeed_op_is_built() {
    "$PY" -c 'import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
built = run_path(str(Path(find_spec("deepspeed").origin).parent / "git_version_info_installed.py"))
torch = ".".join(metadata.version("torch").split(".")[:2])
sys.exit(not (built["installed_ops"].get("deepspeed_shm_comm") and built["torch_info"]["version"] == torch))'
}

# FFCV's metadata asks for opencv-python (and libGL) and five packages that its kernels do not use: --no-deps.
install_ffcv() {
    wants ffcv || return 0
    if [ "$(installed_version ffcv)" = "$FFCV_VERSION" ] && "$PY" -c 'import ffcv._libffcv' 2>/dev/null; then return 0; fi
    say "building ffcv $FFCV_VERSION"
    pip_install setuptools wheel
    pkg-config --exists opencv4 2>/dev/null || export PKG_CONFIG_PATH="$ROOT/deploy/opencv-shim${PKG_CONFIG_PATH:+:$PKG_CONFIG_PATH}"
    build_and_install "ffcv==$FFCV_VERSION"
}

check_installation() {
    local wanted
    wanted="$(constraint_of torch)"
    [ "$(installed_version torch)" = "$wanted" ] ||
        die $EXIT_INFRASTRUCTURE "torch is $(installed_version torch), not $wanted: another package replaced it."
    "$PY" -c 'import torch, pipeline, model, train, deploy' || die $EXIT_INFRASTRUCTURE "the installation does not import."
}

main() {
    local python
    [ -n "$(constraint_of torch)" ] || die $EXIT_CONFIG "constraints.txt must pin torch with =="
    if is_current; then return 0; fi
    # Two commands at once must not install into one environment; the second finds the first one's work done.
    if command -v flock >/dev/null; then
        exec 9<"$ROOT"
        flock 9
        if is_current; then return 0; fi
    fi
    python="$(find_python)"
    install_packages "$python"
    make_venv "$python"
    rm -f "$STAMP"
    install_torch
    say "installing everything else ($EXTRAS)"
    pip_install --editable "${ROOT}[$(python_extras)]"
    install_deepspeed_op
    install_ffcv
    check_installation
    fingerprint >"$STAMP"
    say "done"
}

main "$@"
