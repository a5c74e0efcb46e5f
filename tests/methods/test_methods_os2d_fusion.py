"""Several supports of a class: mean templates, agreement by hand, what one support gives, ranges and extremes."""

import pytest
import torch

from fsdet.methods.os2d.fusion import AGREEMENT, fuse_in_parts, fuse_scores, fuse_templates


def random_scores(supports, views, anchors, seed=0):
    return torch.rand(supports, views, anchors, generator=torch.Generator().manual_seed(seed))


class TestTemplates:
    @pytest.mark.parametrize("fusion", ["max", "agree"])
    def test_all_are_kept(self, fusion):
        templates = torch.randn(3, 2, 225, 4)
        assert fuse_templates(templates, fusion) is templates

    def test_mean_of_each_view(self):
        """Of (3, 4) / 5 and (1, 0): (1.6, 0.8) / 2, of length 0.894; a view is averaged with its like alone."""
        first, second = torch.tensor([0.6, 0.8]), torch.tensor([1.0, 0.0])
        templates = torch.stack([torch.stack([first, second]), torch.stack([second, second])])[:, :, None]
        mean = fuse_templates(templates, "mean")
        assert mean.shape == (1, 2, 1, 2)
        torch.testing.assert_close(mean[0, 0, 0], torch.tensor([0.894427, 0.447214]))
        torch.testing.assert_close(mean[0, 1, 0], second)

    def test_opposite_cells_and_one_support(self):
        opposite = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        assert not fuse_templates(torch.cat([opposite, -opposite]), "mean").any()
        single = torch.randn(1, 2, 225, 4)
        assert fuse_templates(single, "mean") is single


class TestScores:
    @pytest.mark.parametrize("fusion", ["max", "mean"])
    def test_left_alone(self, fusion):
        scores = random_scores(3, 2, 5)
        assert fuse_scores(scores, fusion) is scores

    def test_one_support_is_left_as_it_is(self):
        scores = random_scores(1, 4, 9)
        assert fuse_scores(scores, "agree") is scores

    def test_agreement_by_hand(self):
        """The second support says of everything what the first says, 0.2 higher and at twice the contrast.

        Their means are 0.3 and 0.5, their deviations 0.1 and 0.2; settled, both say 0.4 and 0.4 + 0.15 z.
        """
        z = torch.tensor([-1.0, 1.0, 1.0, -1.0])
        scores = torch.stack([0.3 + 0.1 * z, 0.5 + 0.2 * z])[:, None]
        expected = (0.4 + 0.15 * z).expand(2, 1, 4)
        torch.testing.assert_close(fuse_scores(scores, "agree"), expected, rtol=0, atol=1e-6)

    def test_sight_of_the_others(self):
        """Equal levels: three quarters of the own score, and a quarter of the mean over the supports."""
        z = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
        scores = torch.stack([0.4 + 0.1 * z[0], 0.4 + 0.1 * z[1]])[:, None]
        found = fuse_scores(scores, "agree")
        torch.testing.assert_close(found[0, 0], torch.tensor([0.5, 0.475, 0.325, 0.3]), rtol=0, atol=1e-6)
        torch.testing.assert_close(found[1, 0], torch.tensor([0.5, 0.325, 0.475, 0.3]), rtol=0, atol=1e-6)

    def test_naive_loops_with_views(self):
        scores = random_scores(3, 2, 6).double()
        level = [own.mean() for own in scores]
        contrast = [own.std(correction=0) for own in scores]
        settled = torch.stack(
            [
                sum(level) / 3 + sum(contrast) / 3 * (own - m) / d
                for own, m, d in zip(scores, level, contrast, strict=True)
            ]
        )
        found = fuse_scores(scores, "agree")
        for s in range(3):
            for v in range(2):
                for n in range(6):
                    own = settled[s, v, n]
                    total = own + sum(settled[t, :, n].max() for t in range(3) if t != s)
                    expected = (1 - AGREEMENT) * own + AGREEMENT / 3 * total
                    assert float(found[s, v, n]) == pytest.approx(float(expected.clamp(-1, 1)))

    def test_a_place_that_others_see_gains(self):
        """On many anchors, raising what one support says of a place raises what all say of it."""
        scores = random_scores(3, 1, 1000) * 0.4
        raised = scores.clone()
        raised[1, 0, 7] += 0.3
        gain = fuse_scores(raised, "agree")[:, 0, 7] - fuse_scores(scores, "agree")[:, 0, 7]
        assert (gain > 0.01).all() and gain.argmax() == 1

    def test_a_support_that_likes_everything(self):
        """It has the best scores everywhere, and then no more than its share of the best ones."""
        scores = random_scores(2, 1, 1000) * 0.2 + 0.3
        scores[1] += 0.4
        assert (scores.argmax(dim=0) == 1).all()
        share = (fuse_scores(scores, "agree").argmax(dim=0) == 1).float().mean()
        assert 0.4 < share < 0.6

    def test_order_of_the_supports_does_not_matter(self):
        scores = random_scores(4, 2, 50)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(fuse_scores(scores[order], "agree"), fuse_scores(scores, "agree")[order])

    def test_extremes(self):
        """One anchor, supports without contrast, and scores beyond the range stay finite cosines."""
        assert torch.isfinite(fuse_scores(random_scores(3, 1, 1), "agree")).all()
        constant = torch.tensor([0.2, 0.6]).view(2, 1, 1).expand(2, 1, 5)
        torch.testing.assert_close(fuse_scores(constant, "agree"), torch.full((2, 1, 5), 0.4))
        peak = torch.zeros(2, 1, 1000)
        peak[0, 0, 3], peak[1] = 1.0, torch.linspace(-1, 1, 1000)
        assert float(fuse_scores(peak, "agree").max()) == 1 and float(fuse_scores(-peak, "agree").min()) == -1


class TestParts:
    """Supports that come a few at a time."""

    @pytest.mark.parametrize(("supports", "views", "at_once"), [(7, 3, 2), (5, 1, 1), (4, 2, 4), (300, 1, 64)])
    def test_agreement_is_that_of_all_together(self, supports, views, at_once):
        """Levels and contrasts that differ; sums over parts differ from one sum by rounding alone."""
        contrast = torch.linspace(0.02, 0.3, supports).view(-1, 1, 1)
        scores = contrast * random_scores(supports, views, 200) + torch.linspace(-0.3, 0.4, supports).view(-1, 1, 1)
        parts = scores.split(at_once)
        fuse = fuse_in_parts(iter(parts), "agree")
        found = torch.cat([fuse(part) for part in parts])
        torch.testing.assert_close(found, fuse_scores(scores, "agree"), rtol=0, atol=2e-6)

    def test_a_support_without_contrast(self):
        scores = random_scores(4, 1, 50)
        scores[2] = 0.25
        fuse = fuse_in_parts(scores.split(3), "agree")
        found = torch.cat([fuse(part) for part in scores.split(3)])
        torch.testing.assert_close(found, fuse_scores(scores, "agree"), rtol=0, atol=2e-6)

    @pytest.mark.parametrize("fusion", ["max", "mean"])
    def test_left_alone_and_not_even_read(self, fusion):
        parts = iter([random_scores(3, 2, 5)])
        fuse = fuse_in_parts(parts, fusion)
        scores = next(parts)
        assert fuse(scores) is scores
