"""Grouping by protocol, what stops a report, and every format."""

import csv
import io
import json
import math
import re

import pytest
from evaluation_cases import make_run
from scipy import stats

from fsdet.evaluation.report import build_report, load_results, write_report
from fsdet.evaluation.report_rows import seed_words


def fill(folder, methods=("tfa",), shots=(1, 5), seeds=3, **changes):
    for method in methods:
        for shot in shots:
            for seed in range(seeds):
                make_run(
                    folder, method, shot, seed, nap50=20.0 + shot + 2 * seed + 5 * methods.index(method), **changes
                )


def table(sections, title, section=0):
    return next(t for t in sections[section].tables if t.title.startswith(title))


def test_means_intervals_and_seeds(tmp_path):
    fill(tmp_path)
    sections = build_report(load_results([tmp_path]))
    half = stats.t.ppf(0.975, 2) * 2 / math.sqrt(3)
    assert table(sections, "nAP50").rows == (("tfa", f"23.00 ± {half:.2f}", f"27.00 ± {half:.2f}"),)
    assert table(sections, "nAP50").header == ("method", "1-shot", "5-shot")
    assert "Seeds: 0, 1, 2." in sections[0].notes
    spread = [row for row in table(sections, "Spread").rows if row[1:3] == ("1", "nAP50")]
    legacy = 1.96 * math.sqrt(8 / 3) / math.sqrt(3)
    assert spread[0][3:7] == ("3", "23.00", f"{half:.2f}", f"{legacy:.2f}")
    classes = table(sections, "AP50 by class")
    assert [row[:2] for row in classes.rows] == [
        ("bird", "novel"),
        ("cow", "novel"),
        ("dog", "base"),
        ("person", "base"),
    ]
    assert classes.rows[2][2].startswith("71.0 ±")
    assert table(sections, "Cost").rows[0][:6] == ("tfa", "1", "400", "4", "101", "10")


def test_refuses_a_missing_seed_unless_told(tmp_path):
    fill(tmp_path)
    (tmp_path / "tfa" / "5shot_seed1_0" / "result.json").unlink()
    with pytest.raises(ValueError, match=r"tfa, 5-shot: no run of seed 1 \(found 0, 2\)"):
        write_report([tmp_path])
    text = write_report([tmp_path], allow_missing=True)
    assert "tfa, 5-shot: seeds 0, 2." in text
    assert "tfa, 5-shot: WITHOUT seeds 1." in text
    assert "Seeds: 0, 2." in write_report([tmp_path], seeds=[0, 2])
    with pytest.raises(ValueError, match="no run of seed 3"):
        write_report([tmp_path], seeds=[0, 2, 3])
    with pytest.raises(ValueError, match="no run of seed 7"):
        write_report([tmp_path], seeds=[7], allow_missing=True)  # nothing left to average


def test_seeds_must_start_at_zero(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, seed=seed)
    with pytest.raises(ValueError, match="no run of seed 0"):
        write_report([tmp_path])
    assert "Seeds: 1, 2." in write_report([tmp_path], seeds=[1, 2])


def test_repetitions_of_a_seed(tmp_path):
    """DeFRCN's protocol of one seed repeated: repetitions count as runs, the same one twice is an error."""
    for repeat in range(3):
        make_run(tmp_path, repeat=repeat, nap50=30.0 + repeat)
    text = write_report([tmp_path])
    assert "Seeds: 0 (repeats 0, 1, 2)." in text
    assert "31.00 ±" in text
    make_run(tmp_path / "copy", repeat=1)
    with pytest.raises(ValueError, match="are the same run twice"):
        write_report([tmp_path])


def test_published_protocols_in_one_report(tmp_path):
    """One seed repeated under fsod beside three seeds under gfsod: each section has its own seeds."""
    for number in range(3):
        make_run(tmp_path / "fsrw", repeat=number, setting="fsod")
        make_run(tmp_path / "tfa", seed=number)
    sections = build_report(load_results([tmp_path]))
    assert [section.notes[0] for section in sections] == ["Seeds: 0 (repeats 0, 1, 2).", "Seeds: 0, 1, 2."]
    assert not any(row.missing for section in sections for row in section.rows)


def test_repetitions_and_seeds_are_told_apart(tmp_path):
    """Seed 0 three times and seeds 0 to 2 are two protocols that share runs: never both in one mean unasked."""
    for number in range(3):
        make_run(tmp_path, repeat=number, nap50=30.0 + number)
    for seed in (1, 2):
        make_run(tmp_path, seed=seed, nap50=10.0)
    with pytest.raises(ValueError, match=r"tfa, 1-shot: no run of seed 1, 2 \(repeats 1, 2\) \(found 0 \(repeats 0"):
        write_report([tmp_path])

    def mean(**choice):
        (section,) = build_report(load_results([tmp_path]), **choice)
        return section.rows[0].summary("nAP50").mean, section.notes

    assert mean(seeds=[0])[0] == 31.0
    assert mean(repeats=1)[0] == pytest.approx(50 / 3)
    average, notes = mean(allow_missing=True)
    assert average == pytest.approx(113 / 5) and any("interval is too narrow" in note for note in notes)
    assert not any("interval is too narrow" in note for note in (*mean(seeds=[0])[1], *mean(repeats=1)[1]))


def test_asking_for_no_runs(tmp_path):
    """An empty list of seeds would leave the base stage alone, as if nothing else were there."""
    fill(tmp_path)
    make_run(tmp_path, "frcn", 0, 0, stage="base", samples_digest=None)
    for choice in ({"seeds": []}, {"repeats": 0}):
        with pytest.raises(ValueError, match="No runs are asked for"):
            write_report([tmp_path], **choice)
    with pytest.raises(ValueError, match="no run of seed 7"):
        write_report([tmp_path], seeds=[7], allow_missing=True)


def test_row_without_any_wanted_run_is_told(tmp_path, caplog):
    fill(tmp_path, shots=(1,))
    make_run(tmp_path, "other", seed=5)
    (section,) = build_report(load_results([tmp_path]), seeds=[0, 1, 2], allow_missing=True)
    assert section.labels == ("tfa",)
    assert "Not in the report: other, 1-shot: no run of seed 0, 1, 2 (found 5)" in caplog.text


def test_n_stands_beside_means_where_all_rows_lack_a_seed(tmp_path):
    fill(tmp_path)
    assert "n=" not in write_report([tmp_path], style="brief")
    text = write_report([tmp_path], style="brief", seeds=range(4), allow_missing=True)
    assert text.count("(n=3)") == 2 * 3


def test_brief_report_names_the_settings(tmp_path):
    """Two tables of one title under two settings would be taken for each other."""
    make_run(tmp_path, "frcn", 0, 0, stage="base", samples_digest=None)
    fill(tmp_path / "a")
    assert "gfsod" not in write_report([tmp_path], style="brief")
    fill(tmp_path / "b", setting="fsod")
    text = write_report([tmp_path], style="brief")
    assert text.startswith("voc split 1, fsod: 480 images of") and "\nvoc split 1, gfsod: 480 images of" in text


def test_many_runs_in_few_words():
    keys = [(0, n) for n in range(10)] + [(seed, 0) for seed in (1, 2, 3, 4, 7, 9)]
    assert seed_words(keys) == "0 (repeats 0-9), 1-4, 7, 9"
    assert seed_words([(0, 2), (1, 2)]) == "0, 1 (repeat 2)"


def test_same_protocol_and_seed_with_another_config(tmp_path):
    first = make_run(tmp_path / "a")
    second = make_run(tmp_path / "b", digest="cd" * 32)
    with pytest.raises(ValueError, match="same protocol and seed but different configs") as error:
        write_report([tmp_path])
    assert str(first) in str(error.value)
    assert str(second) in str(error.value)


def test_seeds_of_one_row_must_follow_one_config(tmp_path):
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, digest="cd" * 32)
    with pytest.raises(ValueError, match="average only runs of one recipe"):
        write_report([tmp_path])


@pytest.mark.parametrize(
    "change",
    [
        {"test_images": 4952},
        {"setting": "fsod"},
        {"split": 2},
        {"evaluation": "coco"},
        {"test_set": "voc_test_novel1"},
        {"benchmark": "coco"},
    ],
)
def test_other_measurements_get_their_own_section(tmp_path, change):
    make_run(tmp_path / "a", nap50=10.0)
    make_run(tmp_path / "b", nap50=50.0, **change)
    sections = build_report(load_results([tmp_path]))
    assert len(sections) == 2
    assert sorted(section.rows[0].summary("nAP50").mean for section in sections) == [10.0, 50.0]


@pytest.mark.parametrize(
    "change",
    [
        {"records": "image"},
        {"leak": "drop"},
        {"tta": True},
        {"backbone": "R101-FPN"},
        {"pretraining": "other"},
        {"sampling": "strict"},
        {"base_model": "second"},
        {"difficult": False},
        {"choice": "official"},
        {"calibration": "pcb resnet101 0.5"},
        {"proposals": 100},
    ],
)
def test_other_protocols_are_never_averaged(tmp_path, change):
    make_run(tmp_path / "a", nap50=10.0)
    make_run(tmp_path / "b", nap50=50.0, **change)
    (section,) = build_report(load_results([tmp_path]))
    rows = {row[0]: row[1] for row in next(t for t in section.tables if t.title.startswith("nAP50")).rows}
    assert sorted(rows.values()) == ["10.00", "50.00"]
    (field,) = change
    assert len(rows) == 2
    assert any(field in label or str(change[field]) in label for label in map(section.naming.full, section.rows))


def test_rows_that_differ_without_need_of_a_label_are_listed(tmp_path):
    make_run(tmp_path / "a", "tfa")
    make_run(tmp_path / "b", "defrcn", records="image")
    (section,) = build_report(load_results([tmp_path]))
    differing = section.tables[-1]
    assert differing.title == "Protocols that differ"
    assert differing.rows == (("DeFRCN (defrcn)", "1", "image"), ("tfa", "1", "instance"))


def test_base_stage_beside_novel_runs(tmp_path):
    fill(tmp_path)
    make_run(tmp_path, "frcn", 0, 0, stage="base", samples_digest=None, sampling="none")
    text = write_report([tmp_path])
    assert "base stage" in text
    assert "Seeds: 0, 1, 2." in text  # the base model needs no seeds of its own


def test_comparison(tmp_path):
    fill(tmp_path, methods=("tfa", "defrcn"))
    (section,) = build_report(load_results([tmp_path]), compare=[("defrcn", "tfa")], metrics=["nAP50"])
    assert [(c.shot, c.metric, c.difference.mean) for c in section.comparisons] == [
        (1, "nAP50", 5.0),
        (5, "nAP50", 5.0),
    ]
    assert "DeFRCN (defrcn) minus tfa, paired by seed" in write_report([tmp_path], compare=[("defrcn", "tfa")])
    with pytest.raises(ValueError, match="the results have the methods"):
        write_report([tmp_path], compare=[("defrcn", "fewx")])
    make_run(tmp_path, "tfa", 1, 0, samples_digest="f" * 64)
    with pytest.raises(ValueError, match="other K-shot files"):
        write_report([tmp_path], compare=[("defrcn", "tfa")])


def test_notes_on_what_differs(tmp_path):
    make_run(tmp_path, "tfa", 1, 0)
    make_run(tmp_path, "defrcn", 1, 0, samples_digest="f" * 64)
    text = write_report([tmp_path])
    assert "Rows were trained on different K-shot files at 1-shot seed 0." in text
    assert "different fsdet" not in text
    path = make_run(tmp_path, "defrcn", 1, 0)
    path.write_text(path.read_text().replace('"fsdet": "0.1.0"', '"fsdet": "0.2.0"'))
    text = write_report([tmp_path])
    assert "Runs were made with different fsdet: 0.1.0, 0.2.0." in text
    assert "different K-shot files" not in text


def test_comparison_without_a_seed(tmp_path):
    fill(tmp_path, methods=("tfa", "defrcn"), shots=(1,), seeds=4)
    (tmp_path / "tfa" / "1shot_seed2_0" / "result.json").unlink()
    (section,) = build_report(load_results([tmp_path]), compare=[("defrcn", "tfa")], allow_missing=True)
    assert section.comparisons[0].difference.seeds == ((0, 0), (1, 0), (3, 0))


def test_metrics_can_be_chosen(tmp_path):
    fill(tmp_path)
    text = write_report([tmp_path], metrics=["nAP"])
    assert "nAP by shots" in text
    assert "bAP50" not in text
    with pytest.raises(ValueError, match="No result has the metric APr"):
        write_report([tmp_path], metrics=["APr"])


def test_markdown(tmp_path):
    fill(tmp_path)
    text = write_report([tmp_path], style="markdown")
    assert "### nAP50 by shots\n\n| method   | 1-shot" in text
    assert text.startswith("## voc split 1, gfsod: 480 images of voc_test_all1, VOC-style 11-point evaluation")


def test_csv(tmp_path):
    fill(tmp_path)
    rows = list(csv.DictReader(io.StringIO(write_report([tmp_path], style="csv"))))
    assert len(rows) == 2 * 4
    row = next(row for row in rows if row["shot"] == "5" and row["metric"] == "nAP50")
    assert (row["mean"], row["runs"], row["seeds"]) == ("27.0000", "3", "0 1 2")
    assert float(row["student"]) > float(row["legacy"])


def test_json_has_every_value(tmp_path):
    fill(tmp_path, methods=("tfa", "defrcn"), seeds=2)
    (section,) = json.loads(
        write_report([tmp_path], style="json", compare=[("tfa", "defrcn")]), parse_constant=pytest.fail
    )
    assert section["title"] == "voc split 1, gfsod: voc_test_all1, 480 images, voc-11point"
    row = next(r for r in section["rows"] if r["protocol"]["method"] == "tfa" and r["protocol"]["shot"] == 1)
    assert row["metrics"]["nAP50"]["values"] == [21.0, 23.0]
    assert row["per_class"]["cow"]["AP50"]["mean"] == 22.0
    assert [run["seed"] for run in row["runs"]] == [0, 1]
    assert section["comparisons"][0]["difference"]["mean"] == -5.0


def test_html_is_self_contained_and_escaped(tmp_path):
    fill(tmp_path, methods=("tfa", "<b>bold</b>"))
    output = tmp_path / "page" / "report.html"
    text = write_report([tmp_path], output, style="html")
    assert output.read_text(encoding="utf-8") == text
    assert "http" not in text.replace('http-equiv="', "")
    assert "<b>bold" not in text
    assert "&lt;b&gt;bold" in text
    assert text.count('<svg class="plot"') == 3
    assert text == write_report([tmp_path], style="html")  # the same results give the same page


def test_one_run_and_nan_metrics(tmp_path):
    make_run(tmp_path, nap50=float("nan"))
    for style in ("text", "markdown", "html", "csv", "json"):
        assert not re.search(r"\bnan\b", write_report([tmp_path], style=style), re.IGNORECASE)


def test_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="no result.json in this folder"):
        write_report([tmp_path])
    with pytest.raises(FileNotFoundError, match="no result file"):
        write_report([tmp_path / "x.json"])
    with pytest.raises(ValueError, match="Unknown report format"):
        write_report([tmp_path], style="pdf")
    with pytest.raises(ValueError, match="at least one result"):
        build_report([])
    path = make_run(tmp_path)
    assert len(load_results([tmp_path, path, path.parent])) == 1
