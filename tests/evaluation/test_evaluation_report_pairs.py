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
    assert (item.item, item.first, item.second) == ("DeFRCN (defrcn)", f"defrcn + {PCB}", "defrcn")
    half = stats.t.ppf(0.975, 2) * 1.5 / math.sqrt(3)  # 4, 1, 2.5: mean 2.5, deviation 1.5
    assert item.difference.values == pytest.approx((4.0, 1.0, 2.5))
    table = pair_rows((section,), "Calibration (pcb): with minus without, paired by seed")
    assert table.header[:7] == ("method", "shots", "metric", "with", "without", "difference", "pairs")
    assert table.rows[0][:8] == (
        "DeFRCN (defrcn)", "1-shot", "nAP50", "24.50", "22.00", f"+2.50 ± {half:.2f}", "3", "3 of 3",
    )  # fmt: skip
    assert table.rows[0][-1] == "+4.00 +1.00 +2.50"
    assert "Fewer than 3" not in table.note
    # Side by side, never averaged.
    assert [row[0] for row in section.tables[0].rows] == ["DeFRCN (defrcn)", "DeFRCN (defrcn) + pcb"]


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
    assert "DeFRCN (defrcn), 1-shot, seed 1 (other K-shot files)" in table.note
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
    table = pair_rows(sections, "DeFRCN (defrcn) minus tfa")
    assert "Not verified: in 2 of 6 pairs a result does not record" in table.note
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
    assert "Left out, without a partner: DeFRCN (defrcn), 1-shot, seed 2." in pair_rows((section,), "Calibration").note
    rows = dict(section.tables[0].rows)
    assert rows["DeFRCN (defrcn)"].endswith("(n=3)") and rows["DeFRCN (defrcn) + pcb"].endswith("(n=2)")


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
        "DeFRCN (defrcn) minus tfa",
        "DeFRCN (defrcn) + pcb minus tfa + pcb",
        "tfa minus full",
        "tfa + pcb minus full + pcb",
    ]
    assert section.groups()["DeFRCN (defrcn) + pcb minus tfa + pcb"][0].difference.values == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "name", [f"defrcn + {PCB}", "defrcn + pcb", "DeFRCN (defrcn) + pcb", f"DeFRCN (defrcn) + {PCB}"]
)
def test_rows_can_be_named_by_their_labels(tmp_path, name):
    methods(tmp_path)
    (section,) = build_report(load_results([tmp_path]), compare=[(name, "tfa")], metrics=["nAP50"])
    (item,) = section.groups()["DeFRCN (defrcn) + pcb minus tfa"]
    assert item.difference.values == pytest.approx((3.0, 4.0))
    assert (item.first, item.second) == (f"defrcn + {PCB}", "tfa")
    assert len(section.groups()) == 2  # and the calibration


def test_a_pair_asked_for_by_two_names_is_shown_once(tmp_path):
    methods(tmp_path)
    pairs = [(f"defrcn + {PCB}", "tfa"), ("defrcn + pcb", "tfa")]
    (section,) = build_report(load_results([tmp_path]), compare=pairs, metrics=["nAP50"])
    assert len(section.groups()["DeFRCN (defrcn) + pcb minus tfa"]) == 1


def test_metrics_that_are_equal_in_every_run_are_a_note(tmp_path):
    """`calibrated_runs` leaves bAP50 as it is; nAP50 of the 5-shot runs alone is equal too, but not of all."""
    calibrated_runs(tmp_path / "a")
    calibrated_runs(tmp_path / "b", gains=(0.0, 0.0, 0.0), shot=5)
    sections = build_report(load_results([tmp_path]), metrics=["nAP50", "bAP50"])
    table = pair_rows(sections, "Calibration")
    assert [row[1:3] for row in table.rows] == [("1-shot", "nAP50"), ("5-shot", "nAP50")]
    assert table.note.startswith("Base classes (bAP50): equal in every run. Differences are")
    assert {item.metric for item in sections[0].comparisons} == {"nAP50", "bAP50"}  # files hold them all
    page = render_report(sections, "html").split("with minus without", 1)[1]
    assert page.count('<svg class="plot"') == 1 and "bAP50, %" not in page


def test_comparison_without_any_difference(tmp_path):
    calibrated_runs(tmp_path, gains=(0.0, 0.0, 0.0))
    sections = build_report(load_results([tmp_path]), metrics=["nAP50", "nAP", "bAP50"])
    table = pair_rows(sections, "Calibration")
    assert table.rows == ()
    assert "Novel classes (nAP50, nAP): equal in every run. Base classes (bAP50): equal in every run." in table.note
    for style in ("text", "markdown"):
        assert "p (Wilcoxon)" not in render_report(sections, style)
    page = render_report(sections, "html")
    assert "p (Wilcoxon)" not in page and "Pair by pair" not in page


def test_the_page_folds_the_differences_of_single_pairs(tmp_path):
    calibrated_runs(tmp_path)
    page = render_report(build_report(load_results([tmp_path]), metrics=["nAP50"]), "html")
    means, single = page.split("<summary>Pair by pair</summary>")
    assert "<th>p (Wilcoxon)</th></tr>" in means and "each pair" not in means
    head = "<tr><th>method</th><th>shots</th><th>metric</th><th>each pair</th></tr>"
    row = "<tr><td>DeFRCN (defrcn)</td><td>1-shot</td><td>nAP50</td><td>+4.00 +1.00 +2.50</td></tr>"
    assert head in single and row in single


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
    assert {(row["section"], row["first"], row["second"]) for row in rows} == {
        ("voc split 1, gfsod: voc_test_all1, 480 images, voc-11point", f"defrcn + {PCB}", "defrcn")
    }


def test_calibration_stands_in_the_label_even_of_unlike_methods(tmp_path):
    """The method alone would tell these rows apart, and hide that one of them is calibrated."""
    make_run(tmp_path, "tfa")
    make_run(tmp_path, "defrcn", calibration=PCB)
    (section,) = build_report(load_results([tmp_path]))
    assert section.labels == ("DeFRCN (defrcn) + pcb", "tfa")
