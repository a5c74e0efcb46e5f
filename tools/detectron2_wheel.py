#!/usr/bin/env python3
"""Repack ``pb1-detectron2==0.6`` as a pure-Python wheel named ``detectron2``.

The archive holds Detectron2 v0.6's Python tree, equal file by file to the official tag's, without the C++ sources. What
changes on the way, and why:

* ``detectron2/_C.py`` is added: v0.6 imports the compiled module at top level, though NMS and ROIAlign are
  torchvision's. Calling a compiled operator (rotated boxes, deformable convolution) raises one clear error.
* ``COCOEvaluator``'s compiled fast path falls back to pycocotools, as Detectron2 main does.
* ``Image.LINEAR`` (removed in Pillow 10) becomes ``Image.BILINEAR``, the NumPy aliases removed in 1.24 become the
  built-in types, and ``model_zoo`` finds its files without ``pkg_resources`` (gone from new setuptools).
* ``detectron2.export`` skips its caffe2 half where caffe2 is absent, as Detectron2 main does, so that tracing and
  ``detectron2.utils.analysis`` (operation counts) work.

Each change must apply, or the build stops: a silent miss would surface hours into somebody's run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SOURCE = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6+purepython.2"  # raise the last number with EDITS or PLACEHOLDER, so that old environments are renewed

PLACEHOLDER = '''"""Stands in for Detectron2's compiled operators, which this build does not have."""

is_placeholder = True


def get_compiler_version():
    return "none (pure-Python build)"


def get_cuda_version():
    return "none (pure-Python build)"


def has_cuda():
    return False


def __getattr__(name):
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator, and this Detectron2 was built without a compiler. "
        "Install Detectron2 from its official repository to use it."
    )
'''

# (file or glob, pattern, replacement); a pattern that matches nowhere in its files is an error.
EDITS = (
    ("detectron2/data/transforms/transform.py", r"\bImage\.LINEAR\b", "Image.BILINEAR"),
    ("detectron2/**/*.py", r"\bnp\.(bool|int|float|object|str)\b(?!_)", r"\1"),
    ("detectron2/model_zoo/model_zoo.py", r"(?m)^import pkg_resources\n", ""),
    (
        "detectron2/model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*\"detectron2\.model_zoo\",\s*(.+?)\s*\)\n",
        r"os.path.join(os.path.dirname(os.path.abspath(__file__)), \1)\n",
    ),
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"(?m)^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt\n",
        "",
    ),
    (
        "detectron2/evaluation/coco_evaluation.py",
        r"\(COCOeval_opt if use_fast_impl else COCOeval\)",
        "COCOeval",
    ),
    (
        "detectron2/export/__init__.py",
        r"(?m)^from \.api import \*\n",
        "try:\n    from .api import *\nexcept ImportError:  # caffe2 is not installed\n    pass\n",
    ),
)

# Detectron2 v0.6's own list without the formatter, the caffe2 export and the caps that only served them.
REQUIRES = (
    "Pillow>=7.1", "matplotlib", "pycocotools>=2.0.2", "termcolor>=1.1", "yacs>=0.1.8", "tabulate", "cloudpickle",
    "tqdm>4.29.0", "tensorboard", "fvcore>=0.1.5,<0.1.6", "iopath>=0.1.7,<0.1.11", "omegaconf>=2.1",
    "hydra-core>=1.1",
)  # fmt: skip


def fetch(folder: Path) -> Path:
    """Download the source archive with pip, which checks the hash."""
    wanted = folder / "detectron2.txt"
    wanted.write_text(f"{SOURCE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", ":all:", "--require-hashes", "-r", str(wanted)]
    done = subprocess.run([*command, "-d", str(folder)], check=False)
    archives = list(folder.glob("pb1*detectron2-*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        sys.exit(f"detectron2: pip could not fetch {SOURCE}; see docs/getting-started.md for the official git route.")
    return archives[0]


def patched_tree(archive: Path) -> dict[str, bytes]:
    """The files of the wheel, by path, with every edit applied."""
    with tarfile.open(archive) as tar:
        members = [m for m in tar.getmembers() if m.isfile()]
        files = {m.name.split("/", 1)[1]: tar.extractfile(m).read() for m in members}  # type: ignore[union-attr]
    tree = {name: data for name, data in files.items() if name.startswith("detectron2/")}
    for pattern, old, new in EDITS:
        names = [n for n in tree if Path(n).match(pattern) or (pattern.count("**") and n.endswith(".py"))]
        count = 0
        for name in names:
            text, hits = re.subn(old, new, tree[name].decode())
            tree[name], count = text.encode(), count + hits
        if not count:
            sys.exit(f"detectron2: the edit of {pattern} ({old}) no longer applies to {SOURCE}.")
    tree["detectron2/_C.py"] = PLACEHOLDER.encode()
    tree[f"detectron2-{VERSION}.dist-info/LICENSE"] = files["LICENSE"]
    return tree


def write_wheel(tree: dict[str, bytes], folder: Path) -> Path:
    """Write the wheel (PEP 427), with fixed time stamps so that equal input gives an equal file."""
    info = f"detectron2-{VERSION}.dist-info"
    metadata = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}", "Requires-Python: >=3.7"]
    metadata += [f"Requires-Dist: {need}" for need in REQUIRES]
    tree[f"{info}/METADATA"] = ("\n".join(metadata) + "\n").encode()
    tree[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: fsdet\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for name in sorted(tree):
        code = base64.urlsafe_b64encode(hashlib.sha256(tree[name]).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={code},{len(tree[name])}\n"
    tree[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in sorted(tree):
            wheel.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), tree[name], zipfile.ZIP_DEFLATED)
    return path


def main() -> None:
    """Fetch, patch, pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder that receives the wheel")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = write_wheel(patched_tree(fetch(Path(folder))), args.output)
    sys.stdout.write(f"detectron2: wrote {path.name}\n")


if __name__ == "__main__":
    main()
