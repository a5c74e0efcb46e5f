"""One line of the doctor's page, and how an exception is shown on it."""

from __future__ import annotations

from dataclasses import dataclass

OK, NOTE, FAULT = "ok", "note", "fault"
GIB = 2**30
SETUP_REMEDY = "run `make setup`, or install what requirements.txt pins"


@dataclass(frozen=True)
class Finding:
    """One line of the page.

    Attributes:
        section: heading under which it is printed.
        name: what was examined.
        value: what was found.
        level: "ok", "note" (a run may still succeed) or "fault" (a run would fail).
        remedy: what to do about it; empty when there is nothing to do.
    """

    section: str
    name: str
    value: str
    level: str = OK
    remedy: str = ""


def describe(error: BaseException) -> str:
    """Type and first line of an exception's text."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def one_line(error: BaseException) -> str:
    """The whole text of an error in one line."""
    return " ".join(str(error).split())
