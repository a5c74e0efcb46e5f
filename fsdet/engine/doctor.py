"""Examine the machine, the installed packages, the data and the weights before a run; one pasteable page.

The page also appears where a package is broken: each check imports what it examines by itself, and what goes wrong
there becomes a finding with a remedy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fsdet.engine.doctor_data import check_config, check_data, check_disk, check_weights
from fsdet.engine.doctor_finding import FAULT, NOTE, OK, SETUP_REMEDY, Finding, describe
from fsdet.engine.doctor_installation import check_detectron2, check_device, check_versions

__all__ = ["Finding", "examine", "guarded", "has_faults", "render"]

NAME_WIDTH = 24  # of the page's first column; a longer name pushes its value to the right


def examine(config_file: str = "", opts: Sequence[str] = ()) -> list[Finding]:
    """Examine everything a run stands on.

    Args:
        config_file: with a file, the data, weights and device of that configuration are examined as well, and what it
            lacks is a fault; without one, missing data sets and weights are notes.
        opts: KEY VALUE pairs, as on the command line of tools/train_net.py.
    """
    checks: list[tuple[str, Callable[[], Iterable[Finding]]]] = [
        ("Versions", check_versions),
        ("Detectron2", check_detectron2),
        ("Device", check_device),
        ("Data sets", check_data),
        ("Weights", check_weights),
        ("Disk", lambda: check_disk(Path("output"))),
    ]
    if config_file:
        checks.append(("Configuration", lambda: check_config(config_file, list(opts))))
    findings: list[Finding] = []
    for section, check in checks:
        findings += guarded(section, check)
    return findings


def has_faults(findings: Sequence[Finding]) -> bool:
    """Whether a run would fail."""
    return any(finding.level == FAULT for finding in findings)


def render(findings: Sequence[Finding]) -> str:
    """The page: findings by section, then the remedies of every fault and note."""
    lines = ["fsdet doctor"]
    width = min(max((len(finding.name) for finding in findings), default=0), NAME_WIDTH)
    for section in dict.fromkeys(finding.section for finding in findings):
        lines += ["", section]
        for finding in (f for f in findings if f.section == section):
            mark = "" if finding.level == OK else f"   [{finding.level}]"
            lines.append(f"  {finding.name:<{width}}  {finding.value}{mark}")
            if finding.remedy:
                lines.append(f"  {'':<{width}}  -> {finding.remedy}")
    faults, notes = (sum(f.level == level for f in findings) for level in (FAULT, NOTE))
    lines += ["", f"{faults} fault(s), {notes} note(s)" + (": a run would fail" if faults else ": ready to run")]
    return "\n".join(lines) + "\n"


def guarded(section: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run one check; an exception that it does not expect becomes a fault of its section."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:  # whatever a broken installation raises has to end up on the page
        findings.append(Finding(section, "check stopped", describe(error), FAULT, SETUP_REMEDY))
    return findings
