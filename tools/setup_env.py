#!/usr/bin/env python3
"""Make an environment in which fsdet runs: ``.venv``, pinned requirements, Detectron2.

Needs Python 3.11 or newer and pip's registry; no compiler and no git host. Uses the standard library alone, since
nothing else is there yet. Run again, it compares one digest and returns at once.

Detectron2 comes from the first of these that works:

1. the one that the calling interpreter already imports, if everything else fsdet needs is there too
   (then no ``.venv`` is made);
2. ``pb1-detectron2==0.6`` from the registry, whose Python tree equals the official v0.6 tag's. Its C++ sources are
   missing, so it cannot be built as it stands: the archive is fetched by hash and repacked as a pure-Python wheel
   (``tools/detectron2_wheel.py``). NMS and ROIAlign come from torchvision;
3. the official repository, by hand: see docs/getting-started.md.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STATE = ROOT / ".setup"  # holds the digest of what was installed and the path of the interpreter to use
INPUTS = ("requirements.txt", "pyproject.toml", "tools/setup_env.py", "tools/detectron2_wheel.py")
OLDEST = (3, 11)

# What a run of fsdet and of its tests imports; "detectron2.layers" fails early where _C is missing.
PROBE = (
    "import torch, torchvision, detectron2.layers, detectron2.evaluation, detectron2.model_zoo, fvcore, pycocotools,"
    " cv2, numpy, scipy, safetensors, sklearn, timm, hotcoco, matplotlib, tensorboard, pytest, ruff, importlinter"
)


def digest() -> str:
    """Digest of every file that decides what gets installed, and of the interpreter."""
    sha = hashlib.sha256(f"{sys.version}|{sys.prefix}".encode())
    for name in INPUTS:
        sha.update((ROOT / name).read_bytes())
    return sha.hexdigest()


def is_ready(python: Path | str) -> bool:
    """Whether this interpreter already imports all that fsdet and its tests need."""
    return subprocess.run([str(python), "-c", PROBE], capture_output=True, cwd=ROOT, check=False).returncode == 0


def run(*command: object) -> None:
    """Run one step, showing its command; stop with one line if it fails."""
    shown = " ".join(str(part) for part in command[1:])
    sys.stdout.write(f"setup: {shown}\n")
    sys.stdout.flush()
    if subprocess.run([str(part) for part in command], check=False).returncode != 0:
        sys.exit(f"setup: this step failed: {shown}\nsetup: mend what it names, then run the same command again.")


def install_into(python: Path) -> None:
    """Install the pinned requirements, Detectron2 and fsdet itself for one interpreter."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "install")
    run(*pip, "-r", ROOT / "requirements.txt")
    probe = subprocess.run([python, "-c", "import detectron2.layers"], capture_output=True, cwd=ROOT, check=False)
    if probe.returncode != 0:
        wheels = STATE / "wheels"
        run(python, ROOT / "tools/detectron2_wheel.py", "--output", wheels)
        run(*pip, "--no-deps", "--force-reinstall", *sorted(wheels.glob("detectron2-*.whl")))
    run(*pip, "--no-deps", "--no-build-isolation", "-e", ROOT)


def main() -> None:
    """Set up once; afterwards only compare the digest."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--here", action="store_true", help="install for the calling interpreter, make no .venv")
    args = parser.parse_args()
    if sys.version_info < OLDEST:
        sys.exit(f"setup: Python {OLDEST[0]}.{OLDEST[1]} or newer is needed, this is {sys.version.split()[0]}; "
                 "name another one: make PYTHON=/path/to/python3 ...")
    stamp, chosen, wanted = STATE / "stamp", STATE / "python", digest()
    if stamp.exists() and stamp.read_text() == wanted and Path(chosen.read_text()).exists():
        return
    STATE.mkdir(exist_ok=True)
    venv_python = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if args.here:
        python = Path(sys.executable)
        install_into(python)
    elif not venv_python.exists() and is_ready(sys.executable):
        python = Path(sys.executable)
        sys.stdout.write(f"setup: {python} already has Detectron2 and the rest; no .venv is made\n")
    else:
        python = venv_python
        if not python.exists():
            sys.stdout.write("setup: making .venv\n")
            venv.create(ROOT / ".venv", with_pip=True)
        install_into(python)
        if not is_ready(python):
            run(python, "-c", PROBE)
    chosen.write_text(str(python))
    stamp.write_text(wanted)
    sys.stdout.write("setup: done\n")


if __name__ == "__main__":
    main()
