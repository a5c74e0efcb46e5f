"""Golden detector of OS2D: a narrow ResNet-50 C4 with the released names, and how its golden files are compared.

The model is the one that training builds from configs/os2d, made narrower; the weights reach it through the rename
table that loads released checkpoints, in which the backbone stands twice. The other `parity_os2d_*` modules compare
what it computes.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from fsdet.checkpoint.rename import TABLES, rename
from fsdet.engine.parity import Comparison, Ledger, failure, golden_file, read_npz
from fsdet.engine.parity_fewx_detector import close
from fsdet.engine.setup import load_config
from fsdet.engine.trainer import build_detector
from fsdet.methods.os2d.head import OS2DHead
from fsdet.modeling.torchvision_resnet import BLOCKS

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "os2d"
NETWORK = "r50_c4_torchvision"
TIE = 1e-5  # detections whose scores differ by less may change places
TRUNK = "conv."  # of the transform network, the same for all output layers
# Where the release keeps the backbone of scenes, that of class images, and the transform network.
SCENES, SUPPORTS = "net_feature_maps.", "net_label_features.net_class_features."
TRANSFORM = "os2d_head_creator.aligner.parameter_regressor."


class Version(NamedTuple):
    """Output layer of the transform network in the files, and whether its map is inverted."""

    output: str
    is_inverted: bool


VERSIONS = {"v1": Version("linear_simple", False), "v2": Version("linear_affine", True)}


def transform_state(trunk: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], output: str) -> dict[str, Any]:
    """A transform network under the released names.

    Args:
        trunk: has its convolutions and norms.
        outputs: has its output layer.
        output: name of that layer there.
    """
    state = {name: value for name, value in trunk.items() if name.startswith(TRUNK)}
    state |= {f"linear.{part}": outputs[f"{output}.{part}"] for part in ("weight", "bias")}
    return _under(TRANSFORM, state)


def backbone_state(backbone: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """A backbone in torchvision's names under the released ones, in both of its places."""
    return _under(SCENES, backbone) | _under(SUPPORTS, backbone)


def _under(prefix: str, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """State below a prefix, with the counters of batches that checkpoints have and golden files lack."""
    counters = {name.replace("running_mean", "num_batches_tracked"): 0 for name in state if "running_mean" in name}
    return {prefix + name: value for name, value in {**state, **counters}.items()}


def fill(model: nn.Module, state: Mapping[str, Any]) -> dict[str, str]:
    """Load a state dict under the released names; returns our name of each.

    Raises: ValueError when a tensor of either side finds no partner.
    """
    renamed, report = rename(state, TABLES["os2d"], model.state_dict())
    if not report.is_full:
        raise ValueError(f"the released weights do not fit: {report.describe()}")
    model.load_state_dict(renamed)
    return report.renamed


def golden_head(
    trunk: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray], output: str, *, is_inverted: bool
) -> OS2DHead:
    """Head in evaluation mode with the transform network of the files, see `transform_state`."""
    head = OS2DHead(len(outputs[f"{output}.bias"]), is_inverted)
    fill(nn.ModuleDict({"head": head}), transform_state(trunk, outputs, output))
    return head.eval()


class GoldenDetector:
    """Weights of the set, and the detectors that have them.

    Attributes:
        values: arrays of `model`.
        trunk: arrays of `transform_net`.
        backbone: those of `values` that are the backbone's, by torchvision's names.
        settings: content of `config_json`.
    """

    prefix = "backbone/"

    def __init__(self, folder: Path) -> None:
        self.trunk, self.values = (read_npz(golden_file(folder, stem)) for stem in ("transform_net", "model"))
        own = [name for name in self.values if name.startswith(self.prefix)]
        self.backbone = {name.removeprefix(self.prefix): self.values[name] for name in own}
        self.settings = json.loads(str(self.values["config_json"]))

    def state(self, version: str) -> dict[str, Any]:
        """State dict under the released names."""
        transform = transform_state(self.trunk, self.values, VERSIONS[version].output)
        return backbone_state(self.backbone) | transform

    def config(self, version: str, *opts: str) -> CfgNode:
        """Configuration of a version with the depth, width and pixel statistics of the set, without a file of data."""
        words = [*self._network(), *self.pixels(255.0), *opts]
        return load_config(str(CONFIGS / f"{version}.yaml"), words, model=NETWORK)

    def load(self, version: str, *opts: str) -> nn.Module:
        """Detector of a version as training builds it, with the weights of the set.

        Raises: ValueError when a tensor of either side finds no partner.
        """
        model = build_detector(self.config(version, *opts))
        self.fill(model, version)
        return model

    def fill(self, model: nn.Module, version: str) -> dict[str, str]:
        """Give a detector the weights of the set, see `fill`."""
        return fill(model, self.state(version))

    def _network(self) -> list[str]:
        """Overrides for the golden depth and width, without weights and on the CPU."""
        blocks = tuple(self.settings["backbone"]["blocks"])
        (depth,) = (depth for depth, known in BLOCKS.items() if known == blocks)
        width = len(self.backbone["conv1.weight"])
        widths = {"STEM_OUT_CHANNELS": width, "WIDTH_PER_GROUP": width, "RES2_OUT_CHANNELS": 4 * width, "DEPTH": depth}
        words = [word for key, value in widths.items() for word in (f"MODEL.RESNETS.{key}", str(value))]
        return [*words, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.PATCH.MINING_PERIOD", "0"]

    def pixels(self, white: float) -> list[str]:
        """Overrides for the golden pixel statistics, for pictures whose white is this number."""
        keys = {"MODEL.PIXEL_MEAN": "mean", "MODEL.PIXEL_STD": "std"}
        return [word for key, name in keys.items() for word in (key, str([white * v for v in self.settings[name]]))]


class GoldenLedger(Ledger):
    """Ledger with absolute and relative tolerances, and arrays that are not to be matched.

    Args:
        values, inputs, expected: as in `Ledger`.
        unmatched: name -> why this array is not what fsdet should yield; its difference is reported, never a failure.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        *,
        inputs: Iterable[str] = (),
        expected: Iterable[str] = (),
        unmatched: Mapping[str, str] | None = None,
    ) -> None:
        self.unmatched = dict(unmatched or {})
        super().__init__(values, inputs=inputs, expected=[*expected, *self.unmatched])

    def within(self, name: str, got: Any, allowed: float, label: str = "") -> Comparison:
        """Compare with an absolute difference; with a `label`, another way to an array that is compared as well."""
        if name not in self.values:
            return failure(name + label, "missing in the file")
        row = close(name + label, self.values[name], got, allowed)
        if name in self.unmatched:
            row = replace(row, optional=True, note=f"not to be matched: {self.unmatched[name]}")
        return row if label else self.custom(row)

    def exact(self, name: str, got: Any) -> Comparison:
        """Compare without any difference."""
        return self.compare(name, got, 0.0)

    def direction(self, name: str, got: Any, allowed: float) -> Comparison:
        """Compare a gradient by the length of the difference relative to its own."""
        if name not in self.values:
            return failure(name, "missing in the file")
        expected = np.asarray(self.values[name], np.float64)
        row = close(name, expected, got, np.inf)
        if row.passed:
            difference = np.linalg.norm(expected - np.asarray(got, np.float64)) / (np.linalg.norm(expected) or 1.0)
            row = replace(row, max_rel=float(difference), passed=bool(difference <= allowed))
        return self.custom(row)


def unfolded(values: Mapping[str, np.ndarray], *names: str) -> dict[str, Any]:
    """Values with the named JSON texts read; an object becomes an entry for each of its keys, "name/key"."""
    result = {name: value for name, value in values.items() if name not in names}
    for name in names:
        if name in values:
            content = json.loads(str(values[name]))
            entries = {f"{name}/{key}": value for key, value in content.items()} if isinstance(content, dict) else {}
            result |= entries or {name: content}
    return result


def check_transform(folder: Path) -> Iterator[Comparison]:
    """transform_net: every tensor arrives in the head under its released name, with both output layers."""
    values = read_npz(golden_file(folder, "transform_net"))
    found: dict[str, Any] = {}
    for output, is_inverted in VERSIONS.values():
        net = golden_head(values, values, output, is_inverted=is_inverted).transform_net
        for name, tensor in net.state_dict().items():
            if "num_batches" not in name:
                found[name.replace("linear.", f"{output}.")] = tensor.numpy()
    ledger = GoldenLedger(values, expected=found)
    for name, value in found.items():
        yield ledger.exact(name, value)
    yield from ledger.rest()


def ranked_order(boxes: np.ndarray | None, scores: np.ndarray | None, got: np.ndarray) -> np.ndarray:
    """Order of the rows of `got` (M, 4) in which they are `boxes` (M, 4), within each run of scores that nearly tie.

    Args:
        boxes, scores: of the file, the best first, class by class or all together; None where it lacks them.
        got: boxes in the order of their own scores.
    Returns: (M,) places in `got`; as they are where the numbers of rows differ.
    """
    order = np.arange(len(got))
    if boxes is None or scores is None or not len(boxes) == len(scores) == len(got):
        return order
    ends = np.flatnonzero(np.abs(np.diff(scores)) >= TIE) + 1
    for run in np.split(order.copy(), ends):
        left = run.tolist()
        for row in run if len(run) > 1 else ():
            order[row] = left.pop(int(np.abs(got[left] - boxes[row]).max(axis=1).argmin()))
    return order
