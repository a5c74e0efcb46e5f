"""What the log of a run ends with. Imports nothing heavy: a sweep's workers start with it."""

from __future__ import annotations

import re
from pathlib import Path

_TAIL = 64 * 1024  # bytes at the end of a log that are searched; a traceback is shorter
# A line that names an error, of Python or of a command line.
ERROR_LINE = re.compile(r"(?:error: |[\w.]*(?:Error|Exception|Interrupt)\b).*")


def last_lines(log: Path, offset: int = 0) -> list[str]:
    """The lines at the end of a log that is there.

    Args:
        log: text file.
        offset: bytes to pass over, which belong to an earlier attempt.
    """
    with log.open("rb") as file:
        file.seek(max(offset, log.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace").splitlines()
