"""The golden check of calibration passes, and fails when something that it is there to notice is wrong."""

from pathlib import Path

import numpy as np
import pytest

from fsdet.engine import parity_calibration
from fsdet.engine.parity import read_npz
from fsdet.engine.parity_calibration import check_pcb
from fsdet.modeling import calibration
from fsdet.modeling.calibration import CalibratedDetector
from fsdet.modeling.imagenet import ImageEncoder
from fsdet.modeling.support_boxes import LegacyBoxes, exact_boxes

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "defrcn"


def failed(folder=GOLDEN):
    return {row.name for row in check_pcb(folder) if not row.passed}


def test_every_array_is_compared():
    rows = list(check_pcb(GOLDEN))
    assert all(row.passed for row in rows)
    names = read_npz(GOLDEN / "d_pcb.npz")
    assert sorted(row.name for row in rows) == sorted(names)
    inputs = {row.name for row in rows if row.note == "input"}
    assert len(inputs) == 13 + 4 * 9 and not any("features" in n or "scores_after" in n or "used" in n for n in inputs)


def test_wrong_alpha(monkeypatch):
    original = CalibratedDetector.__init__

    def swapped(self, *args, alpha, **kwargs):
        original(self, *args, alpha=1 - alpha, **kwargs)

    monkeypatch.setattr(CalibratedDetector, "__init__", swapped)
    # At 0.5 the two weights are equal.
    assert failed() == {f"{scenario}/alt_scores_after" for scenario in parity_calibration.SCENARIOS}


def test_wrong_channel_order(monkeypatch):
    original = ImageEncoder.feature_map

    def turned(self, picture, image_format="BGR"):
        return original(self, picture, "RGB" if image_format == "BGR" else "BGR")

    monkeypatch.setattr(ImageEncoder, "feature_map", turned)
    names = failed()
    assert "support/img0_feature_map" in names and "fsod_voc/prototypes" in names


def test_wrong_exclusion(monkeypatch):
    def everything(cfg, class_names, novel_names):
        return tuple(class_names)

    monkeypatch.setattr(parity_calibration, "calibrated_names", everything)
    names = failed()
    assert {"gfsod_voc/excluded", "gfsod_voc/default_scores_after", "gfsod_coco/default_scores_after"} <= names
    assert not any(name.startswith("fsod") for name in names)


def test_wrong_box_ratio(monkeypatch):
    monkeypatch.setattr(LegacyBoxes, "__call__", lambda self, picture, boxes: exact_boxes(picture, boxes))
    names = failed()
    assert {f"{scenario}/used_boxes" for scenario in parity_calibration.SCENARIOS} <= names


def test_wrong_limits(monkeypatch):
    monkeypatch.setattr(CalibratedDetector, "in_range", lambda self, scores: scores > self.lower)
    names = failed()
    assert {"gfsod_voc/alt_scores_after", "fsod_coco/alt_features"} <= names


def test_wrong_similarity(monkeypatch):
    monkeypatch.setattr(calibration, "normalize", lambda x, dim: x)
    assert "fsod_voc/default_scores_after" in failed()


def test_a_missing_or_unknown_array(tmp_path):
    values = read_npz(GOLDEN / "d_pcb.npz")
    np.savez(tmp_path / "d_pcb.npz", **values, surprise=np.zeros(2))
    assert failed(tmp_path) == {"surprise"}
    del values["fsod_voc/used_boxes"]
    np.savez(tmp_path / "d_pcb.npz", **values)
    with pytest.raises(KeyError, match="fsod_voc/used_boxes"):
        failed(tmp_path)
