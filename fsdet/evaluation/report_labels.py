"""What the rows of a report are called: by the field's names for readers, by ids in files and on the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .report_rows import Row

# Names from the papers. Recipes of one method share its name; their ids, which stand beside it, keep them apart.
METHOD_NAMES = {
    "frcn": "Faster R-CNN",
    "frcn_ft_full": "FRCN+ft-full",
    "frcn_novel_only": "novel-only predictor",
    "tfa_fc": "TFA w/ fc",
    "tfa_cos": "TFA w/ cos",
    "tfa_cos_fast": "TFA w/ cos",
    "tfa_cos_30seeds": "TFA w/ cos",
    "defrcn": "DeFRCN",
    "defrcn_fast": "DeFRCN",
    "fewx": "FewX",
    "fewx_direct": "FewX",
    "fewx_ft": "FewX, fine-tuned",
    "os2d_v1": "OS2D V1",
    "os2d_v1_direct": "OS2D V1",
    "os2d_v2": "OS2D V2",
    "os2d_v2_direct": "OS2D V2",
}

# Fields whose value says what it is.
PLAIN_FIELDS = ("method", "benchmark", "test_set", "setting", "backbone", "evaluation")

_CALIBRATION = re.compile(r"pcb (?P<network>[^\s:]+)(:(?P<digest>\w+))? (?P<weight>\S+)( (?P<others>.+))?")


@dataclass(frozen=True)
class Labels:
    """The labels of a section's rows; with the number of shots each is unique there.

    Attributes:
        fields: protocol fields that, beside the shots, tell the rows apart.
        calibrations: those that stand in labels. A single one is shown as its first word, and `key` says it in full.
    """

    fields: tuple[str, ...] = ()
    calibrations: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Labels:
        """Labels as short as these rows allow."""
        fields = label_fields(rows)
        found = dict.fromkeys(row.protocol.calibration for row in rows if "calibration" in fields)
        return cls(fields, tuple(name for name in found if name))

    def shown(self, row: Row) -> str:
        """For tables and legends, e.g. "TFA w/ cos (tfa_cos) + pcb, records image"."""
        return self._label(row, method_name(row.protocol.method), self.short(row.protocol.calibration))

    def plain(self, row: Row) -> str:
        """As `shown`, without the calibration."""
        return self._label(row, method_name(row.protocol.method), "")

    def full(self, row: Row) -> str:
        """For files, e.g. "tfa_cos + pcb resnet101:5d3b4d8f 0.5, records image"."""
        return self._label(row, row.protocol.method, row.protocol.calibration if self.calibrations else "")

    def accepted(self, row: Row) -> frozenset[str]:
        """What the command line may call a row: its id with or without the name, its calibration short or in full."""
        method, calibration = row.protocol.method, row.protocol.calibration
        forms = {self.short(calibration), calibration}
        return frozenset(self._label(row, name, form) for name in (method, method_name(method)) for form in forms)

    def short(self, calibration: str) -> str:
        """A calibration as labels show it; "" where they need not."""
        if len(self.calibrations) == 1:
            return calibration.partition(" ")[0]
        return calibration if self.calibrations else ""

    def key(self) -> Iterator[str]:
        """One line for each calibration of the labels: its full form, and what that says."""
        for calibration in self.calibrations:
            short, words = self.short(calibration), calibration_words(calibration)
            name = f'"{calibration}"' if short == calibration else f'"+ {short}" stands for "{calibration}"'
            if words or short != calibration:
                yield f"{name}{': ' if words else ''}{words}."

    def _label(self, row: Row, method: str, calibration: str) -> str:
        others = (name for name in self.fields if name not in ("method", "calibration"))
        head = f"{method} + {calibration}" if calibration else method
        return ", ".join([head, *(_field_text(name, getattr(row.protocol, name)) for name in others)])


def method_name(method: str) -> str:
    """The field's name with the id beside it, e.g. "TFA w/ cos (tfa_cos)"; an unknown id stays as it is."""
    return f"{METHOD_NAMES[method]} ({method})" if method in METHOD_NAMES else method


def calibration_words(calibration: str) -> str:
    """What "pcb NETWORK:DIGEST WEIGHT ..." of a protocol says; "" for other text."""
    found = _CALIBRATION.fullmatch(calibration)
    if not found:
        return ""
    digest = f" (its weights file's SHA-256 starts with {found['digest']})" if found["digest"] else ""
    others = f"; other settings: {found['others']}" if found["others"] else ""
    return (
        f"prototypical calibration with the network {found['network']}{digest} and weight {found['weight']} for the "
        f"detector's score{others}"
    )


def label_fields(rows: Sequence[Row]) -> tuple[str, ...]:
    """Fewest protocol fields that, beside the shots, tell all rows apart.

    The method always comes first, then the calibration where it differs: no reader should have to look that up.
    """
    protocols = [asdict(row.protocol) for row in rows]
    names = ["method", *(["calibration"] if len({row.protocol.calibration for row in rows}) > 1 else [])]
    while True:
        groups: dict[tuple, list[dict]] = {}
        for protocol in protocols:
            groups.setdefault(tuple(protocol[name] for name in (*names, "shot")), []).append(protocol)
        alike = next((group for group in groups.values() if len(group) > 1), None)
        if alike is None:
            return tuple(names)
        fields = [key for key, _ in rows[0].protocol.group() if key not in names]
        names.append(next(key for key in fields if len({str(protocol[key]) for protocol in alike}) > 1))


def _field_text(name: str, value: object) -> str:
    if name == "proposals" and not value:
        return "proposals not recorded"
    return str(value) if name in PLAIN_FIELDS else f"{name} {value}"
