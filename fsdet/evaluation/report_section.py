"""What a report consists of, before it is rendered: tables, comparisons and sections."""

from __future__ import annotations

from dataclasses import dataclass

from .aggregate import PairedDifference
from .report_labels import Labels
from .report_rows import Row


@dataclass(frozen=True)
class Table:
    """A titled table: header, rows of text, a note below; `detail` tables are folded where a format can."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    detail: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two rows on one metric at one number of shots, over the seeds that both have.

    Attributes:
        title: of the group that it belongs to; a group is one table and one plot.
        item: what it is about within the group; "" where the title says it all.
        shot: K of both rows.
        first, second: labels of the rows in full, with ids; the difference is first minus second.
        metric: e.g. "nAP50".
        difference: over the pairs.
        alone: runs without a partner, which are left out, e.g. "tfa_cos: seed 2".
        unverified: pairs of which a run, or both, does not record its K-shot files: they may be others.
    """

    title: str
    item: str
    shot: int
    first: str
    second: str
    metric: str
    difference: PairedDifference
    alone: tuple[str, ...] = ()
    unverified: int = 0


@dataclass(frozen=True)
class Fact:
    """A field of the protocol that all rows of a section share: its name in words, value, and what the value means."""

    name: str
    value: str
    meaning: str = ""


@dataclass(frozen=True)
class Section:
    """Rows measured in the same way on the same test set; without rows, a list of what could not be measured.

    Attributes:
        title: what they share.
        rows: one per protocol.
        metrics: headline metrics.
        tables: in reading order.
        naming: the labels of the rows.
        headlines: how many of the first tables hold the headline numbers.
        protocol: what all rows share.
        notes: seeds, missing runs, remarks on versions.
        comparisons: paired by seed.
    """

    title: str
    rows: tuple[Row, ...]
    metrics: tuple[str, ...]
    tables: tuple[Table, ...]
    naming: Labels = Labels()
    headlines: int = 0
    protocol: tuple[Fact, ...] = ()
    notes: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the rows, in their order, as tables and legends show them."""
        return tuple(map(self.naming.shown, self.rows))

    @property
    def novel(self) -> tuple[tuple[str, Row], ...]:
        """(label, row) of the novel-stage rows, which have shots."""
        return tuple(pair for pair in zip(self.labels, self.rows, strict=True) if pair[1].protocol.stage != "base")

    def groups(self) -> dict[str, list[Comparison]]:
        """Comparisons by title."""
        found: dict[str, list[Comparison]] = {}
        for item in self.comparisons:
            found.setdefault(item.title, []).append(item)
        return found
