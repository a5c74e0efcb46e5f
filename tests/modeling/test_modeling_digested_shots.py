"""Which supports of a class are taken where there are more than the limit."""

from fsdet.data.support import Support, SupportSet
from fsdet.modeling.digested_shots import draw_shots


def test_more_supports_than_the_limit(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    support_set = SupportSet(
        ("ant", "bee"),
        [
            Support(str(tmp_path / f"{number}.png"), number, number, class_id, (16.0, 8.0, 70.0, 48.0))
            for class_id in (0, 1)
            for number in range(6)
        ],
    )

    def chosen(limit, seed):
        drawn = draw_shots(support_set, limit, seed)
        return {name: [support.image_id for support in own] for name, (own, _) in drawn.items()}

    assert chosen(6, 0) == chosen(30, 1) == {"ant": [0, 1, 2, 3, 4, 5], "bee": [0, 1, 2, 3, 4, 5]}
    draws = [chosen(3, seed) for seed in range(4)]
    assert draws == [chosen(3, seed) for seed in range(4)]
    assert all(len(own) == 3 and own == sorted(set(own)) for draw in draws for own in draw.values())
    assert any(draw["ant"] != draw["bee"] for draw in draws) and any(draw != draws[0] for draw in draws)
