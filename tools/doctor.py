#!/usr/bin/env python3
"""Print one page about this machine and installation; exit 1 when a run would fail."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the page must appear where fsdet is not installed

from fsdet.engine.doctor import examine, has_faults, render


def main() -> int:
    """Examine, print, and tell by the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", default="", help="examine the data and weights of this configuration as well")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="[KEY VALUE ...]", help="configuration values")
    args = parser.parse_args()
    findings = examine(args.config_file, args.opts)
    print(render(findings), end="")
    return 1 if has_faults(findings) else 0


if __name__ == "__main__":
    sys.exit(main())
