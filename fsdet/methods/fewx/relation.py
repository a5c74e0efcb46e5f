"""Multi-relation head: whether a region of the query shows what the supports of a class show.

Three heads compare the region's feature Q with the mean support feature S: the global one their averages, the local
one their maps channel by channel, the patch one their maps cell by cell. The scores are summed; the patch head also
regresses the box. A linear map of the concatenated pair is the sum of a map of Q and one of S, so what depends on the
supports alone is computed once per class (`SupportParts`), and what depends on the region alone once per region
(`RegionParts`).

Source: FewX (Fan et al., CVPR 2020), section 4.2.2, in the form of the release; parameter names are the release's.
Shapes: R regions, K classes, C channels of res5, P cells a side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fsdet.methods.fewx.filtering import FilteredConv2d
from fsdet.methods.fewx.folded import pointwise
from fsdet.modeling.derived import is_cpu_inference

RELATIONS = ("global", "local", "patch")
MATCH, BACKGROUND = 0, 1  # columns of the logits
MIN_CELLS = 5  # pooling and convolution of the patch head take 4 cells off a side
_INIT_STD, _BOX_INIT_STD = 0.01, 0.001  # release


@dataclass(frozen=True)
class _Parts:
    """Halves of the relation heads, one row per region or class; None for a head that is left out."""

    pooled: Tensor | None  # (., C), fc_1
    embedded: Tensor | None  # (., C, P, P), conv_cor
    patch: Tensor  # (., C / 4, P, P), conv_1

    def __len__(self) -> int:
        return len(self.patch)

    def _map(self, change: Callable[[Tensor], Tensor]) -> _Parts:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return type(self)(**{name: None if value is None else change(value) for name, value in values.items()})


class RegionParts(_Parts):
    """What the heads make of R regions, whatever class they are compared with."""


class SupportParts(_Parts):
    """What the heads make of the mean support feature of K classes, whatever region it is compared with."""

    def select(self, rows: Tensor | slice) -> SupportParts:
        """The parts of some classes."""
        return self._map(lambda value: value[rows])  # type: ignore[return-value]

    def to(self, device: torch.device | str) -> SupportParts:
        """The parts on a device."""
        return self._map(lambda value: value.to(device))  # type: ignore[return-value]


def _by_class(combine: Callable[[Tensor, Tensor], Tensor], regions: Tensor, support: Tensor, index: Tensor) -> Tensor:
    """Combine every region with its class; regions of one class that lie together share the class's row in memory."""
    classes, counts = torch.unique_consecutive(index, return_counts=True)
    if len(classes) < 2:
        return combine(regions, support[classes])
    pieces = zip(regions.split(counts.tolist()), classes.tolist(), strict=True)
    return torch.cat([combine(piece, support[row : row + 1]) for piece, row in pieces])


def _correlation(region: Tensor, support: Tensor) -> Tensor:
    """Dot products of two maps, channel by channel: (R, C), in single precision."""
    return (region.float() * support.float()).sum(dim=(2, 3))


class MultiRelationHead(nn.Module):
    """Binary classifier of pairs (region, class), with a class-agnostic box regression.

    Where `relations` leaves out "patch", its layers remain for the boxes and `cls_score_pr` is absent.
    """

    def __init__(
        self, channels: int, cells: int, relations: Sequence[str] = RELATIONS, *, mean_correlation: bool = False
    ) -> None:
        """Make the layers, initialised as in the release.

        Args:
            channels: C of the region features, a multiple of 4.
            cells: P, at least 5 (the release: 7).
            relations: heads whose scores are summed; at least one of "global", "local", "patch".
            mean_correlation: the local head averages over the cells where the release sums (ours). The sum is some
                fifty times what the other heads read, so that large learning rates end at a constant prediction.
        Raises: ValueError for an unknown, repeated or missing head, and for too few cells.
        """
        super().__init__()
        if not relations or len(set(relations)) != len(relations) or not set(relations) <= set(RELATIONS):
            raise ValueError(f"FEWX.RELATIONS: got {tuple(relations)}, expected one or more of {RELATIONS}, each once")
        if cells < MIN_CELLS:
            raise ValueError(
                f"Region features of {cells} x {cells} cells are too small for the patch relation head, which needs "
                f"{MIN_CELLS}; set MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION to 9 or more (the release: 14)"
            )
        self.channels, self.relations = channels, tuple(name for name in RELATIONS if name in relations)
        self.correlation_scale = 1 / cells**2 if mean_correlation else 1.0
        narrow = channels // 4
        self.conv_1 = nn.Conv2d(2 * channels, narrow, 1, bias=False)
        self.conv_2 = FilteredConv2d(narrow, narrow, padding=0, bias=False)
        self.conv_3 = nn.Conv2d(narrow, channels, 1, bias=False)
        self.bbox_pred_pr = nn.Linear(channels, 4)
        if "patch" in relations:
            self.cls_score_pr = nn.Linear(channels, 2)
        if "local" in relations:
            self.conv_cor = nn.Conv2d(channels, channels, 1, bias=False)
            self.cls_score_cor = nn.Linear(channels, 2)
        if "global" in relations:
            self.fc_1 = nn.Linear(2 * channels, channels)
            self.fc_2 = nn.Linear(channels, channels)
            self.cls_score_fc = nn.Linear(channels, 2)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=_BOX_INIT_STD if name == "bbox_pred_pr.weight" else _INIT_STD)

    def encode(self, support: Tensor) -> SupportParts:
        """The class's share of the heads, from mean support features (K, C, P, P)."""
        fc_bias = self.fc_1.bias if "global" in self.relations else None
        return SupportParts(*self._halves(support, slice(self.channels, None), fc_bias))

    def embed(self, regions: Tensor) -> RegionParts:
        """The region's share of the heads, from region features (R, C, P, P)."""
        return RegionParts(*self._halves(regions, slice(None, self.channels), None))

    def _halves(
        self, feature: Tensor, half: slice, fc_bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """One half of each concatenation: query first, support second."""
        feature = feature.contiguous(memory_format=torch.channels_last)
        conv = pointwise if is_cpu_inference(self, feature) else F.conv2d
        pooled = embedded = None
        if "global" in self.relations:
            pooled = F.linear(feature.mean(dim=(2, 3)), self.fc_1.weight[:, half], fc_bias)
        if "local" in self.relations:
            embedded = conv(feature, self.conv_cor.weight)
        return pooled, embedded, conv(feature, self.conv_1.weight[:, half])

    def vectors(self, regions: RegionParts, support: SupportParts, index: Tensor) -> dict[str, Tensor]:
        """What the last linear layer of each head reads: head -> (R, C); "patch" is always there."""
        result = {}
        if regions.pooled is not None:
            result["global"] = self.fc_2(F.relu(regions.pooled + support.pooled[index])).relu()
        if regions.embedded is not None:
            correlation = _by_class(_correlation, regions.embedded, support.embedded, index)
            result["local"] = (correlation * self.correlation_scale).relu()
        patch = F.relu(_by_class(torch.add, regions.patch, support.patch, index))
        patch = self.conv_2(F.avg_pool2d(patch, 3, stride=1))
        result["patch"] = self.conv_3(patch).relu().mean(dim=(2, 3))
        return result

    def relate(self, regions: RegionParts, support: SupportParts, index: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, from the parts of both sides."""
        vectors = self.vectors(regions, support, index)
        return sum(self._scores(vectors).values()), self.bbox_pred_pr(vectors["patch"])

    def _scores(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        layers = {"global": "cls_score_fc", "local": "cls_score_cor", "patch": "cls_score_pr"}
        return {name: getattr(self, layers[name])(vectors[name]) for name in self.relations}

    def scores_by_head(self, regions: Tensor, support: SupportParts, index: Tensor) -> dict[str, Tensor]:
        """The logits of each head apart, head -> (R, 2); arguments as in `forward`."""
        return self._scores(self.vectors(self.embed(regions), support, index))

    def forward(self, regions: Tensor, support: SupportParts, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compare regions with classes.

        Args:
            regions: (R, C, P, P) features of the query's regions behind res5.
            support: parts of K classes, see `encode`.
            index: (R,) int64 in [0, K): the class that each region is compared with. Any order; regions of one class
                side by side cost least.
        Returns: logits (R, 2), column 0 = match, and box deltas (R, 4) for weights (10, 10, 5, 5).
        """
        return self.relate(self.embed(regions), support, index)
