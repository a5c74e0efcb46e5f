"""Paired comparisons: what may be compared, with which runs, and what the tables say."""

import csv
import io
import json
import math

import pytest
from evaluation_cases import make_run
from scipy import stats

from fsdet.evaluation.report import build_report, load_results, read_report, render_report, save_report

PCB = "pcb resnet101 0.5"


def pair_rows(sections, title):
    return next(t for section in sections for t in section.tables if t.title.startswith(title))


def calibrated_runs(folder, gains=(4.0, 1.0, 2.5), shot=1, method="defrcn"):
    """Runs of nAP50 20, 22, 24, ... and the same runs with calibration, higher by `gains`."""
    for seed, gain in enumerate(gains):
        make_run(folder / "plain", method, shot, seed, nap50=20.0 + 2 * seed)
        make_run(folder / "pcb", method, shot, seed, nap50=20.0 + 2 * seed + gain, calibration=PCB)


def test_calibration_is_compared_with_the_same_runs_unasked(tmp_path):
    calibrated_runs(tmp_path)
    (section,) = build_report(load_results([tmp_path]), metrics=["nAP50"])
    (item,) = section.comparisons
    assert (item.item, item.first, item.second) == ("defrcn", f"defrcn + {PCB}", "defrcn")
    half = stats.t.ppf(0.975, 2) * 1.5 / math.sqrt(3)  # 4, 1, 2.5: mean 2.5, deviation 1.5
    assert item.difference.values == pytest.approx((4.0, 1.0, 2.5))
    table = pair_rows((section,), f"Calibration ({PCB}): with minus without, paired by seed")
    assert table.header[:7] == ("method", "shots", "metric", "with", "without", "difference", "pairs")
    assert table.rows[0][:8] == (
        "defrcn", "1-shot", "nAP50", "24.50", "22.00", f"+2.50 ± {half:.2f}", "3", "3 of 3",
    )  # fmt: skip
    assert table.rows[0][-1] == "+4.00 +1.00 +2.50"
    assert "Fewer than 3" not in table.note
    assert [row[0] for row in section.tables[0].rows] == ["defrcn", f"defrcn + {PCB}"]  # side by side, never averaged


@pytest.mark.parametrize("change", [{"shot": 5}, {"method": "tfa"}, {"proposals": 100}, {"setting": "fsod"}])
def test_other_runs_are_no_pair_of_a_calibrated_one(tmp_path, change):
    changes = {"method": "defrcn", "shot": 1} | change
    for seed in range(2):
        make_run(tmp_path / "plain", "defrcn", 1, seed)
        make_run(tmp_path / "pcb", changes["method"], changes["shot"], seed, calibration=PCB, **{
            key: value for key, value in change.items() if key not in ("method", "shot")
        })  # fmt: skip
    sections = build_report(load_results([tmp_path]))
    assert not any(section.comparisons for section in sections)


def test_runs_on_other_shots_are_left_out_and_named(tmp_path):
    calibrated_runs(tmp_path)
    make_run(tmp_path / "pcb", "defrcn", 1, 1, nap50=90.0, calibration=PCB, samples_digest="f" * 64)
    (section,) = build_report(load_results([tmp_path]), metrics=["nAP50"])
    assert section.comparisons[0].difference.seeds == ((0, 0), (2, 0))
    table = pair_rows((section,), "Calibration")
    assert "defrcn, 1-shot, seed 1 (other K-shot files)" in table.note
    assert "Fewer than 3 pairs are no evidence" in table.note


def test_unrecorded_shots_are_paired_and_counted(tmp_path):
    """Seed 1 is unknown on one side and seed 2 on both; 5 shots are all known."""
    for seed in range(3):
        make_run(tmp_path, "defrcn", 1, seed, nap50=30.0 + seed, **({"samples_digest": None} if seed else {}))
        make_run(tmp_path, "tfa", 1, seed, nap50=20.0, **({"samples_digest": None} if seed == 2 else {}))
        make_run(tmp_path, "defrcn", 5, seed)
        make_run(tmp_path, "tfa", 5, seed)
    results = load_results([tmp_path])
    sections = build_report(results, compare=[("defrcn", "tfa")], metrics=["nAP50", "nAP"])
    assert [(item.shot, item.unverified) for item in sections[0].comparisons] == [(1, 2), (1, 2), (5, 0), (5, 0)]
    assert sections[0].comparisons[0].difference.values == pytest.approx((10.0, 11.0, 12.0))
    assert "Not verified: in 2 of 6 pairs a result does not record" in pair_rows(sections, "defrcn minus tfa").note
    assert json.loads(render_report(sections, "json"))[0]["comparisons"][0]["unverified"] == 2


def test_recorded_shots_need_no_note(tmp_path):
    calibrated_runs(tmp_path)
    sections = build_report(load_results([tmp_path]), metrics=["nAP50"])
    assert "Not verified" not in pair_rows(sections, "Calibration").note


def test_runs_without_partner_are_named(tmp_path):
    calibrated_runs(tmp_path)
    next((tmp_path / "pcb").rglob("1shot_seed2_0/result.json")).unlink()
    (section,) = build_report(load_results([tmp_path]), metrics=["nAP50"], allow_missing=True)
    assert section.comparisons[0].difference.values == pytest.approx((4.0, 1.0))
    assert "Left out, without a partner: defrcn, 1-shot, seed 2." in pair_rows((section,), "Calibration").note
    rows = dict(section.tables[0].rows)
    assert rows["defrcn"].endswith("(n=3)") and rows[f"defrcn + {PCB}"].endswith("(n=2)")


def test_one_pair_has_no_interval(tmp_path):
    calibrated_runs(tmp_path, gains=(4.0,))
    sections = build_report(load_results([tmp_path]), metrics=["nAP50"])
    table = pair_rows(sections, "Calibration")
    assert table.rows[0][5:] == ("+4.00", "1", "1 of 1", "–", "–", "+4.00")
    assert "one difference has no interval" in table.note
    json.loads(render_report(sections, "json"), parse_constant=pytest.fail)
    assert "nan" not in render_report(sections, "html")


def methods(folder):
    for method, level in (("defrcn", 30.0), ("tfa", 20.0), ("full", 12.0)):
        calibrated_runs(folder / method, gains=(level / 10, level / 10 + 1), method=method)


def test_several_pairs_of_methods(tmp_path):
    """Each with its own calibration: plain with plain, calibrated with calibrated."""
    methods(tmp_path)
    (section,) = build_report(load_results([tmp_path]), compare=[("defrcn", "tfa"), ("tfa", "full")], metrics=["nAP50"])
    assert [title for title in section.groups() if not title.startswith("Calibration")] == [
        "defrcn minus tfa",
        f"defrcn + {PCB} minus tfa + {PCB}",
        "tfa minus full",
        f"tfa + {PCB} minus full + {PCB}",
    ]
    assert section.groups()[f"defrcn + {PCB} minus tfa + {PCB}"][0].difference.values == pytest.approx((1.0, 1.0))


def test_rows_can_be_named_by_their_labels(tmp_path):
    methods(tmp_path)
    pair = (f"defrcn + {PCB}", "tfa")
    (section,) = build_report(load_results([tmp_path]), compare=[pair], metrics=["nAP50"])
    assert section.groups()[f"defrcn + {PCB} minus tfa"][0].difference.values == pytest.approx((3.0, 4.0))
    assert list(section.groups()).count(f"defrcn + {PCB} minus tfa") == 1
    assert len(section.groups()) == 2  # and the calibration


def test_what_cannot_be_compared_is_explained(tmp_path):
    for seed in range(2):
        make_run(tmp_path / "a", "defrcn", 1, seed, proposals=100)
        make_run(tmp_path / "b", "tfa", 1, seed, proposals=300)
    results = load_results([tmp_path])
    with pytest.raises(ValueError, match="between defrcn and tfa: their rows differ in proposals"):
        build_report(results, compare=[("defrcn", "tfa")])
    with pytest.raises(ValueError, match=r"the results have the methods \['defrcn', 'tfa'\]"):
        build_report(results, compare=[("defrcn", "fewx")])
    with pytest.raises(ValueError, match="between tfa and tfa: they are one name"):
        build_report(results, compare=[("tfa", "tfa")])
    with pytest.raises(ValueError, match="between two methods, got 'defrcn'"):
        build_report(results, compare=("defrcn", "tfa"))


def test_methods_without_a_common_seed(tmp_path):
    for seed in range(2):
        make_run(tmp_path, "defrcn" if seed else "tfa", 1, seed)
    results = load_results([tmp_path])
    with pytest.raises(ValueError, match="they have no seed in common"):
        build_report(results, compare=[("defrcn", "tfa")], allow_missing=True)


def test_every_format_shows_the_pairs(tmp_path):
    calibrated_runs(tmp_path / "runs")
    sections = read_report([tmp_path / "runs"], metrics=["nAP50"])
    for style in ("text", "markdown", "html"):
        assert "+4.00 +1.00 +2.50" in render_report(sections, style)
    (section,) = json.loads(render_report(sections, "json"))
    assert section["comparisons"][0]["difference"]["higher"] == 3
    files = save_report(sections, tmp_path / "report.csv")
    assert [file.name for file in files] == ["report.csv", "report_paired.csv"]
    rows = list(csv.DictReader(io.StringIO(files[1].read_text())))
    assert [(row["seed"], row["difference"], row["pairs"]) for row in rows] == [
        ("0", "4.0000", "3"),
        ("1", "1.0000", "3"),
        ("2", "2.5000", "3"),
    ]
    assert {row["mean_difference"] for row in rows} == {"2.5000"}


def test_calibration_stands_in_the_label_even_of_unlike_methods(tmp_path):
    """The method alone would tell these rows apart, and hide that one of them is calibrated."""
    make_run(tmp_path, "tfa")
    make_run(tmp_path, "defrcn", calibration=PCB)
    (section,) = build_report(load_results([tmp_path]))
    assert section.labels == (f"defrcn + {PCB}", "tfa")
