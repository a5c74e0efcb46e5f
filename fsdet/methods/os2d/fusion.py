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

from collections.abc import Callable, Iterable

from torch import Tensor, std_mean
from torch.nn import functional as F

FUSIONS = ("max", "mean", "agree")
AGREEMENT = 0.25  # a
_LEAST_DEVIATION = 1e-6  # of scores that are all alike


def fuse_templates(templates: Tensor, fusion: str) -> Tensor:
    """What of a class's templates is matched: (S, V, 225, D) as they are, or for "mean" (1, V, 225, D).

    The mean is taken where the templates lie, without a copy of them.
    """
    if fusion != "mean" or len(templates) == 1:
        return templates
    return F.normalize(templates.mean(dim=0, keepdim=True), dim=-1)


def fuse_scores(scores: Tensor, fusion: str) -> Tensor:
    """Scores (S, V, N) of a class's supports on the N anchors of all levels of a picture, as its boxes get them."""
    if fusion != "agree" or len(scores) == 1:
        return scores
    mean, deviation = _statistics(scores)
    scores = _levelled(scores, mean, deviation, mean.mean(), deviation.mean())
    seen = scores.amax(dim=1, keepdim=True)  # (S, 1, N)
    return _agreed(scores, seen, seen.sum(dim=0, keepdim=True), len(scores))


def fuse_in_parts(parts: Iterable[Tensor], fusion: str) -> Callable[[Tensor], Tensor]:
    """`fuse_scores` of a class whose supports come a few at a time.

    Args:
        parts: scores (s, V, N) of s supports each, of all supports together; read once, and for "agree" alone.
        fusion: as in `fuse_scores`.
    Returns: what makes of the scores of such a part those that its boxes get.
    """
    if fusion != "agree":
        return lambda scores: scores
    agreement = _Agreement()
    for scores in parts:
        agreement.add(scores)
    return agreement.fuse


class _Agreement:
    """What is known of a class's supports together; its size does not grow with their number.

    The sum over the supports of their best views' q needs M and D, which are known at the end alone. But it is
    S * M + D * (sum over s of max over v of (p - m) / d).
    """

    def __init__(self) -> None:
        self._supports = 0
        self._means, self._deviations = 0.0, 0.0  # sums over the supports
        self._standing: float | Tensor = 0.0  # (1, 1, N) the last sum above

    def add(self, scores: Tensor) -> None:
        """Take note of the scores (s, V, N) of s supports."""
        mean, deviation = _statistics(scores)
        self._supports += len(scores)
        self._means += float(mean.sum())
        self._deviations += float(deviation.sum())
        standing = _levelled(scores.amax(dim=1, keepdim=True), mean, deviation, 0.0, 1.0)
        self._standing = self._standing + standing.sum(dim=0, keepdim=True)

    def fuse(self, scores: Tensor) -> Tensor:
        """Scores (s, V, N) of s of the supports that were added, as their boxes get them."""
        level, contrast = self._means / self._supports, self._deviations / self._supports
        scores = _levelled(scores, *_statistics(scores), level, contrast)
        total = self._supports * level + contrast * self._standing
        return _agreed(scores, scores.amax(dim=1, keepdim=True), total, self._supports)


def _statistics(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, both (S, 1, 1), of the scores (S, V, N) of every support."""
    deviation, mean = std_mean(scores, dim=(1, 2), keepdim=True, correction=0)
    return mean, deviation


def _levelled(
    scores: Tensor, mean: Tensor, deviation: Tensor, level: float | Tensor, contrast: float | Tensor
) -> Tensor:
    """From p to q: each support's scores, brought from its own mean and deviation to common ones."""
    return level + contrast * (scores - mean) / deviation.clamp(min=_LEAST_DEVIATION)


def _agreed(scores: Tensor, seen: Tensor, total: Tensor, supports: int) -> Tensor:
    """From q (s, V, N) to scores; `seen` (s, 1, N) is q of the best views, `total` (1, 1, N) their sum over all S."""
    fused = (1 - AGREEMENT) * scores + AGREEMENT / supports * (scores + (total - seen))
    return fused.clamp(-1, 1)
