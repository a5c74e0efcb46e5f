"""Several supports of a class: how their templates and scores become one.

- "max": the boxes of all supports are joined, and the best one of a place stays (the release's treatment of views).
- "mean": the templates are averaged cell by cell and normalised again, so that a class costs as much as one support.
- "agree" (ours): as "max", but with scores that the supports of a class have settled among each other.

Why "max" does not gain from more supports: a template of smooth or common texture has high cosines everywhere, so that
its false matches beat the true ones of its sisters; and the largest of more numbers is larger by chance alone, most of
all where nothing is. "agree" answers both. Let p[s, v, n] be the score of view v of support s at anchor n, on all
levels of one picture, m[s] and d[s] mean and standard deviation of the scores of a support, M and D the means of these
over the S supports:

    q[s, v, n] = M + D * (p[s, v, n] - m[s]) / d[s]
    score[s, v, n] = (1 - a) * q[s, v, n] + a / S * (q[s, v, n] + sum over t other than s of max over w of q[t, w, n])

with a = 1/4. First every support is judged by what it says of the picture as a whole, most of which is background: a
score counts as far as it stands out. Then a box gains from every other support that sees its anchor, too, and own sight
keeps the larger weight, since examples of a class may look different. One support is left as it is (q = p). The cost is
that of a few passes over the scores; results stay cosines in scale, cut at -1 and 1.

Views of a support (turned, mirrored) are further readings of the same example; they are joined in all three ways.
"""

from __future__ import annotations

from torch import Tensor, std_mean
from torch.nn import functional as F

FUSIONS = ("max", "mean", "agree")
AGREEMENT = 0.25  # a
_LEAST_DEVIATION = 1e-6  # of scores that are all alike


def fuse_templates(templates: Tensor, fusion: str) -> Tensor:
    """What of a class's templates is matched: (S, V, 225, D) as they are, or for "mean" (1, V, 225, D)."""
    if fusion != "mean" or len(templates) == 1:
        return templates
    return F.normalize(templates.mean(dim=0, keepdim=True), dim=-1)


def fuse_scores(scores: Tensor, fusion: str) -> Tensor:
    """Scores (S, V, N) of a class's supports on the N anchors of all levels of a picture, as its boxes get them."""
    if fusion != "agree" or len(scores) == 1:
        return scores
    deviation, mean = std_mean(scores, dim=(1, 2), keepdim=True, correction=0)  # (S, 1, 1)
    scores = mean.mean() + deviation.mean() * (scores - mean) / deviation.clamp(min=_LEAST_DEVIATION)
    seen = scores.amax(dim=1, keepdim=True)  # (S, 1, N)
    others = seen.sum(dim=0, keepdim=True) - seen
    fused = (1 - AGREEMENT) * scores + AGREEMENT / len(scores) * (scores + others)
    return fused.clamp(-1, 1)
