"""OS2D: one-stage one-shot detection by matching dense features, with learned alignment.

Paper: "OS2D: One-Stage One-Shot Object Detection by Matching Anchor Features", Osokin, Sumin, Lomakin, ECCV 2020,
arXiv 2003.06800. Official code: https://github.com/aosokin/os2d (MIT).

Parts: `detector.py` (training, inference), `memory.py` and `templates.py` (supports to templates), `head.py` with
`transform_net.py`, `geometry.py` and `sampling.py` (alignment, score and box of every anchor), `training.py`,
`targets.py`, `objective.py` and `mining.py` (what is learnt), `pyramid.py`, `inference.py`, `decoding.py`,
`streamed_nms.py` and `fusion.py` (scales, classes, suppression, several supports), `settings.py` (keys).

Departures from the release: suppression is exact unless OS2D.NMS asks for the release's; the ranked list loss keeps its
negatives on every device; a difficult object never becomes a target by another one's code; a learning rate that falls
does not bring an earlier model back. Changing no number: templates are made once and kept with the digest of their
weights; a scene is normalised once; only the places that enter the score are sampled; boxes come from four corners.
"""

from __future__ import annotations

from fsdet.methods.os2d import detector  # noqa: F401 (it registers itself)
from fsdet.methods.os2d.settings import add_config, complete_config, idle_keys, setting_faults

__all__ = ["add_config", "complete_config", "idle_keys", "setting_faults"]
