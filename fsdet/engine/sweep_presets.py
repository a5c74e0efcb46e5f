"""Protocols of the literature as values of a sweep: settings, shots, seeds and repetitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fsdet.engine.setup import load_config

# K of the published tables, by FEWSHOT.LAYOUT. Source: TFA (Wang et al., ICML 2020) section 4, DeFRCN (Qiao et al.,
# ICCV 2021) section 4.
PUBLISHED_SHOTS = {"voc": (1, 2, 3, 5, 10), "coco": (1, 2, 3, 5, 10, 30)}


@dataclass(frozen=True)
class Preset:
    """What a protocol runs at each number of shots.

    Attributes:
        settings: "fsod" and/or "gfsod".
        seeds: draws of the K shots.
        repeats: trainings on each draw.
    """

    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    repeats: int = 1


# The three series of DeFRCN's run scripts. TFA itself draws 30 seeds on VOC and 10 on COCO.
PRESETS = {
    "fsrw": Preset(("fsod",), (0,), repeats=10),  # FSRW-like: the one official draw, trained ten times
    "tfa": Preset(("gfsod",), tuple(range(10))),  # TFA-like
    "fsod-seeds": Preset(("fsod",), tuple(range(10))),
}


def published_shots(config_files: Sequence[str], opts: Sequence[str] = ()) -> tuple[int, ...]:
    """The published numbers of shots on the benchmark of novel configurations.

    Raises: ValueError for own data, and for configurations of several benchmarks.
    """
    # A novel configuration names no number of shots of its own, so that any will do to read its benchmark.
    layouts = {load_config(file, [*opts, "FEWSHOT.SHOT", "1"]).FEWSHOT.LAYOUT for file in config_files}
    if len(layouts) > 1:
        raise ValueError(
            f"The novel configs are of several benchmarks, {sorted(layouts)}; choose --shots, or sweep each"
        )
    (layout,) = layouts
    if layout not in PUBLISHED_SHOTS:
        raise ValueError(f"{config_files[0]}: own data has no published numbers of shots; choose them with --shots")
    return PUBLISHED_SHOTS[layout]
