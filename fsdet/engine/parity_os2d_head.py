"""Golden head of OS2D: templates, correlations, alignment, scores, boxes and corners, and their gradients.

The outputs of both versions are computed twice: as training does, and, labelled, as inference does.

Source: OS2D (Osokin et al., ECCV 2020), official release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.engine.parity import Comparison, golden_file, read_npz
from fsdet.engine.parity_fewx_detector import close
from fsdet.engine.parity_os2d_detector import VERSIONS, GoldenLedger, Version, golden_head
from fsdet.layers.correlation import correlate, normalize_cells
from fsdet.methods.os2d.geometry import SIDE, affine, anchor_boxes, anchor_centers, decode_boxes
from fsdet.methods.os2d.head import OS2DHead
from fsdet.methods.os2d.sampling import pool_samples, sampling_grid
from fsdet.methods.os2d.templates import template_of

OUTPUTS, CORNERS = 2e-5, 5e-3  # the latter in pixels
GRADIENTS = 1e-4  # length of the difference, relative
SUPPORT = "class_feature_map_"
INFERENCE = " (at inference)"
ALONE = ("class_maps_15x15_normalized", "correlation_image0_class0", "class_pool_mask")
PARTS = ("recognition", "localization", "corners")
# Further combinations of output layer and inversion, of which the file has the scores.
COMBINATIONS = {"full_noinv": Version("linear_affine", False), "simple_inv": Version("linear_simple", True)}
TRAINED = {"conv1_running_mean_after": "1.running_mean", "conv4_running_var_after": "4.running_var"}  # of the trunk
BIASES = ("v1_tiny", "v1_flip")  # the output layer is a bias alone
# Cases of small features: the input that scales them, and the outputs that the file has.
SMALL = {
    "v2_lownorm": ("query_scale", ("recognition", "localization")),
    "v2_vanishing": ("query_scale", ("recognition", "localization")),
    "v2_lownorm_class": ("class_scale", ("recognition",)),
}
GRADIENT_NAMES = (
    "grad_query", "grad_class_0", "grad_linear_weight", "grad_linear_bias", "grad_conv0_bias",
    "grad_query_transform_detached", "grad_linear_bias_localization",
)  # fmt: skip


def check_head(folder: Path) -> Iterator[Comparison]:
    """head: from feature maps to scores and boxes in all combinations, in training and at inference; gradients."""
    case = _Case(folder)
    ledger = GoldenLedger(case.values, inputs=_inputs(case.values), expected=_expected())
    with torch.no_grad():
        yield from _compare_correlation(ledger, case)
        for version in VERSIONS:
            yield from _compare_version(ledger, case, version)
        for name, combination in COMBINATIONS.items():
            outputs = _outputs(case.head(combination), case.scenes, case.templates, case.size)
            yield ledger.within(f"{name}/recognition", outputs["recognition"], OUTPUTS)
        yield from _compare_training_mode(ledger, case)
        yield from _compare_biases(ledger, case)
        yield from _compare_small(ledger, case)
    for version in VERSIONS:
        for name, gradient in _gradients(case, version).items():
            yield ledger.direction(f"{version}/{name}", gradient, GRADIENTS)
    yield from ledger.rest()


def _inputs(values: Mapping[str, np.ndarray]) -> list[str]:
    """Names of the inputs; the supports are numbered from 0."""
    count = sum(name.startswith(SUPPORT) for name in values)
    scales = [f"{name}/{scale}" for name, (scale, _) in SMALL.items()]
    supports = [f"{SUPPORT}{number}" for number in range(count)]
    return ["query_feature_map", *supports, "grad_probe", *scales, *(f"{name}/bias" for name in BIASES)]


def _expected() -> list[str]:
    """Names of the results."""
    names = {
        **{version: ("transform_raw", "theta", *PARTS, *GRADIENT_NAMES) for version in VERSIONS},
        **{name: ("recognition",) for name in COMBINATIONS},
        "v1_trainbn": ("recognition", "localization", *TRAINED),
        **{name: PARTS for name in BIASES},
        **{name: parts for name, (_, parts) in SMALL.items()},
    }
    return [*ALONE, *(f"{prefix}/{part}" for prefix, parts in names.items() for part in parts)]


class _Case:
    """Inputs of the file, and heads with its weights.

    Attributes:
        values: arrays of the file.
        scenes: (B, D, H, W).
        supports: (1, D, h, w) each.
        templates: (C, 225, D).
    """

    def __init__(self, folder: Path) -> None:
        self.values, self._weights = (read_npz(golden_file(folder, stem)) for stem in ("head", "transform_net"))
        self.scenes = self.tensor("query_feature_map")
        self.supports = [self.tensor(name) for name in _inputs(self.values) if name.startswith(SUPPORT)]
        self.templates = torch.stack([template_of(support) for support in self.supports])

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.scenes.shape[2], self.scenes.shape[3]

    def tensor(self, name: str) -> Tensor:
        """A copy of an array."""
        return torch.from_numpy(self.values[name].copy())

    def head(self, version: Version) -> OS2DHead:
        """A head in evaluation mode."""
        return golden_head(self._weights, self._weights, version.output, is_inverted=version.is_inverted)


def _outputs(head: OS2DHead, scenes: Tensor, templates: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Recognition (B, C, 1, H, W), localization (B, C, 4, H, W) and corners (B, C, 8, H, W)."""
    matches = head(scenes, templates, corners=True)
    columns = matches.scores[:, :, None], matches.codes.mT, matches.corners.flatten(3).mT
    return {name: column.unflatten(3, size) for name, column in zip(PARTS, columns, strict=True)}


def _tolerance(part: str) -> float:
    return CORNERS if part == "corners" else OUTPUTS


def _compare_correlation(ledger: GoldenLedger, case: _Case) -> Iterator[Comparison]:
    """Templates, one correlation map, and the weight that each cell of a template has in a score."""
    cells = case.templates.unflatten(1, (SIDE, SIDE))  # column, row
    yield ledger.within(ALONE[0], cells.permute(0, 3, 2, 1), OUTPUTS)
    first = correlate(case.templates[:1], normalize_cells(case.scenes[0]))[0]
    yield ledger.within(ALONE[1], first, OUTPUTS)
    single = torch.eye(SIDE * SIDE)[..., None, None]  # maps of one cell, on which one channel each correlates by 1
    grid = sampling_grid(torch.eye(2, 3)[None, None], anchor_centers(1, 1), (1, 1))
    yield ledger.within(ALONE[2], pool_samples(single, grid).view(SIDE, SIDE).T, OUTPUTS)


def _compare_version(ledger: GoldenLedger, case: _Case, version: str) -> Iterator[Comparison]:
    """Parameters, matrices and outputs of V1 or V2, and the outputs at inference."""
    head = case.head(VERSIONS[version])
    raw = head.transform_net(correlate(case.templates, normalize_cells(case.scenes)).flatten(0, 1))
    yield ledger.within(f"{version}/transform_raw", raw, OUTPUTS)
    matrices = affine(raw.movedim(1, -1), inverse=head.inverse)
    yield ledger.within(f"{version}/theta", matrices, OUTPUTS)
    for part, value in _outputs(head, case.scenes, case.templates, case.size).items():
        yield ledger.within(f"{version}/{part}", value, _tolerance(part))
    found = [head.detect(scene, case.templates, corners=True) for scene in case.scenes]
    scores, boxes, corners = (torch.stack(column) for column in zip(*found, strict=True))
    yield ledger.within(f"{version}/recognition", scores[:, :, None].unflatten(3, case.size), OUTPUTS, INFERENCE)
    corners = corners.flatten(3).mT.unflatten(3, case.size)
    yield ledger.within(f"{version}/corners", corners, CORNERS, INFERENCE)
    wanted = decode_boxes(case.tensor(f"{version}/localization").flatten(3).mT, anchor_boxes(*case.size))
    yield close(f"{version}/localization (boxes at inference)", wanted, boxes, CORNERS)


def _compare_training_mode(ledger: GoldenLedger, case: _Case) -> Iterator[Comparison]:
    """V1 with the statistics of the batch, and what it keeps of them."""
    head = case.head(VERSIONS["v1"]).train()
    outputs = _outputs(head, case.scenes, case.templates, case.size)
    for part in PARTS[:2]:
        yield ledger.within(f"v1_trainbn/{part}", outputs[part], OUTPUTS)
    for name, buffer in TRAINED.items():
        yield ledger.within(f"v1_trainbn/{name}", head.transform_net.conv.get_buffer(buffer), OUTPUTS)


def _compare_biases(ledger: GoldenLedger, case: _Case) -> Iterator[Comparison]:
    """The same alignment everywhere: boxes below one pixel, and mirrored ones."""
    for name in BIASES:
        head = case.head(VERSIONS["v1"])
        nn.init.zeros_(head.transform_net.linear.weight)
        head.transform_net.linear.bias.copy_(case.tensor(f"{name}/bias"))
        for part, value in _outputs(head, case.scenes[:1], case.templates[:1], case.size).items():
            yield ledger.within(f"{name}/{part}", value, _tolerance(part))


def _compare_small(ledger: GoldenLedger, case: _Case) -> Iterator[Comparison]:
    """Features so small that the numbers beside their norms matter; scores relative to the largest one."""
    head = case.head(VERSIONS["v2"])
    for name, (input_name, parts) in SMALL.items():
        scale = float(case.values[f"{name}/{input_name}"])
        scene, support = case.scenes[:1], case.supports[0]
        if input_name == "query_scale":
            scene = scene * scale
        else:
            support = support * scale
        outputs = _outputs(head, scene, template_of(support)[None], case.size)
        for part in parts:
            largest = float(np.abs(case.values[f"{name}/{part}"]).max()) if part == "recognition" else 1.0
            yield ledger.within(f"{name}/{part}", outputs[part], OUTPUTS * largest)


def _gradients(case: _Case, version: str) -> dict[str, Tensor]:
    """Gradients of the first scene and support, by the names of the file."""
    head, scene, support = case.head(VERSIONS[version]), case.scenes[:1].clone(), case.supports[0].clone()
    net, probe = head.transform_net, case.tensor("grad_probe").flatten()
    leaves = {
        "grad_query": scene.requires_grad_(),
        "grad_class_0": support.requires_grad_(),
        "grad_linear_weight": net.linear.weight,
        "grad_linear_bias": net.linear.bias,
        "grad_conv0_bias": net.conv[0].bias,
    }
    matches = head(scene, template_of(support)[None])

    def gradients(values: Tensor, *wanted: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((values * probe).sum(), wanted, retain_graph=True)

    found = dict(zip(leaves, gradients(matches.scores, *leaves.values()), strict=True))
    (found["grad_query_transform_detached"],) = gradients(matches.detached_scores, scene)
    (found["grad_linear_bias_localization"],) = gradients(matches.codes.mT, net.linear.bias)
    return found
