"""The multi-relation head: halves against the concatenated form, ablation, rows of several classes."""

import pytest
import torch
import torch.nn.functional as F

from fsdet.methods.fewx.relation import RELATIONS, MultiRelationHead, SupportParts

C, P = 16, 7


def head_of(relations=RELATIONS, cells=P, channels=C):
    torch.manual_seed(0)
    head = MultiRelationHead(channels, cells, relations).eval()
    for parameter in head.parameters():  # larger than at the start, so that every part counts
        torch.nn.init.normal_(parameter, std=0.2)
    return head


def pairs(rows=9, classes=3, cells=P, channels=C):
    generator = torch.Generator().manual_seed(1)
    regions = torch.rand(rows, channels, cells, cells, generator=generator)
    support = torch.rand(classes, channels, cells, cells, generator=generator)
    return regions, support, torch.tensor([0, 0, 2, 1, 1, 1, 0, 2, 2][:rows])


def concatenated(head, q, s):
    """The published form, one pair (1, C, P, P) at a time."""
    x = torch.cat([q.mean((2, 3)), s.mean((2, 3))], dim=1)
    scores = {"global": head.cls_score_fc(F.relu(head.fc_2(F.relu(head.fc_1(x)))))}
    kernel = F.conv2d(s, head.conv_cor.weight).transpose(0, 1)
    local = F.conv2d(F.conv2d(q, head.conv_cor.weight), kernel, groups=q.shape[1])
    scores["local"] = head.cls_score_cor(F.relu(local).flatten(1))
    patch = F.avg_pool2d(F.relu(head.conv_1(torch.cat([q, s], dim=1))), 3, 1)
    patch = F.relu(head.conv_3(F.relu(F.conv2d(patch, head.conv_2.weight))))
    patch = F.avg_pool2d(patch, 3).flatten(1)
    scores["patch"] = head.cls_score_pr(patch)
    return scores, head.bbox_pred_pr(patch)


@torch.no_grad()
def test_rows_of_several_classes_equal_pairs_one_by_one():
    head, (regions, support, index) = head_of(), pairs()
    logits, deltas = head(regions, head.encode(support), index)
    apart = head.scores_by_head(regions, head.encode(support), index)
    for row, number in enumerate(index.tolist()):
        scores, boxes = concatenated(head, regions[row : row + 1], support[number : number + 1])
        torch.testing.assert_close(logits[row], sum(scores.values())[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(deltas[row], boxes[0], rtol=1e-4, atol=1e-4)
        for name in RELATIONS:
            torch.testing.assert_close(apart[name][row], scores[name][0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_mean_correlation_is_the_sum_over_the_number_of_cells():
    head, (regions, support, index) = head_of(), pairs()
    mean = MultiRelationHead(C, P, mean_correlation=True).eval()
    mean.load_state_dict(head.state_dict())
    vectors = [one.vectors(one.embed(regions), one.encode(support), index) for one in (head, mean)]
    torch.testing.assert_close(vectors[1]["local"], vectors[0]["local"] / P**2)
    assert all(torch.equal(vectors[0][name], vectors[1][name]) for name in ("global", "patch"))


@pytest.mark.parametrize(
    ("relations", "absent"),
    [
        (("global", "local"), {"cls_score_pr"}),
        (("local", "patch"), {"fc_1", "fc_2", "cls_score_fc"}),
        (("patch",), {"fc_1", "fc_2", "cls_score_fc", "conv_cor", "cls_score_cor"}),
        (("patch", "global"), {"conv_cor", "cls_score_cor"}),
    ],
)
def test_ablation(relations, absent):
    """What is left out is not in the sum and has no parameters; the boxes stay."""
    whole, part, (regions, support, index) = head_of(), head_of(relations), pairs()
    missing = part.load_state_dict(whole.state_dict(), strict=False)
    assert {name.split(".")[0] for name in missing.unexpected_keys} == absent and not missing.missing_keys
    expected = whole.scores_by_head(regions, whole.encode(support), index)
    logits, deltas = part(regions, part.encode(support), index)
    torch.testing.assert_close(logits, sum(expected[name] for name in relations))
    torch.testing.assert_close(deltas, whole(regions, whole.encode(support), index)[1])
    (logits.sum() + deltas.sum()).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


@pytest.mark.parametrize(("cells", "channels"), [(5, 8), (6, 24), (9, 16)])
def test_other_sizes(cells, channels):
    head = head_of(cells=cells, channels=channels)
    regions, support, index = pairs(cells=cells, channels=channels)
    logits, deltas = head(regions, head.encode(support), index)
    assert logits.shape == (9, 2) and deltas.shape == (9, 4)


@torch.no_grad()
def test_no_region():
    head, (regions, support, _) = head_of(), pairs()
    logits, deltas = head(regions[:0], head.encode(support), torch.zeros(0, dtype=torch.int64))
    assert logits.shape == (0, 2) and deltas.shape == (0, 4)


@torch.no_grad()
def test_parts_of_some_classes():
    head, (regions, support, _) = head_of(("local", "patch")), pairs()
    parts = head.encode(support)
    assert isinstance(parts, SupportParts) and len(parts) == 3 and parts.pooled is None
    some = parts.select(torch.tensor([2, 0])).to("cpu")
    index = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 0])
    wanted = head(regions, parts, torch.tensor([2, 0])[index])
    for got, expected in zip(head(regions, some, index), wanted, strict=True):
        torch.testing.assert_close(got, expected)


def test_mixed_precision():
    head, (regions, support, index) = head_of(), pairs()
    wanted, _ = head(regions, head.encode(support), index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, deltas = head(regions, head.encode(support), index)
        (logits.float().sum() + deltas.float().sum()).backward()
    assert (logits.float() - wanted).norm() < 0.02 * wanted.norm()
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


@pytest.mark.parametrize("relations", [(), ("global", "global"), ("text",)])
def test_unknown_heads_are_refused(relations):
    with pytest.raises(ValueError, match="FEWX.RELATIONS: got"):
        MultiRelationHead(C, P, relations)
