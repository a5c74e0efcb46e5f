"""The page and the files beside it: contents, links, protocol in words, curves, runs without a result."""

import math
import re

import pytest
import yaml
from evaluation_cases import make_run
from scipy import stats

from fsdet.evaluation.report import build_report, load_results, read_report, render_report, save_report
from fsdet.evaluation.report_gallery import Gallery
from fsdet.evaluation.report_plot import HEIGHT, TOP, WIDTH, differences_plot, legend, looks, shots_plot

PCB = "pcb resnet101 0.5"


def fill(folder, methods=("tfa",), shots=(1, 5), seeds=3, **changes):
    for method in methods:
        for shot in shots:
            for seed in range(seeds):
                make_run(folder, method, shot, seed, nap50=20.0 + shot + 2 * seed, **changes)


def only_section(folder, **arguments):
    (section,) = build_report(load_results([folder]), **arguments)
    return section


class TestPage:
    def test_every_link_has_its_place(self, tmp_path):
        fill(tmp_path / "a", ("tfa", "defrcn"))
        fill(tmp_path / "b", setting="fsod")
        make_run(tmp_path, "frcn", 0, 0, stage="base", samples_digest=None, test_set="voc_test_base1")
        sections = read_report([tmp_path], compare=[("defrcn", "tfa")])
        page = render_report(sections, "html", [Gallery("tfa, 1-shot", (), ())])
        links = set(re.findall(r'href="#([^"]+)"', page))
        places = re.findall(r' id="([^"]+)"', page)
        assert len(places) == len(set(places))
        assert links <= set(places)
        assert {"section-1-protocol", "section-2-pairs", "section-3", "gallery-1"} <= links
        assert "section-3-curves" not in links  # the base stage has no shots

    def test_loads_nothing(self, tmp_path):
        fill(tmp_path)
        page = render_report(read_report([tmp_path]), "html")
        assert not re.search(r"https?:|<script|<link|@import|url\(|\bsrc=(?!\"data:)", page)

    def test_protocol_stands_in_words(self, tmp_path):
        fill(tmp_path, seeds=1, proposals=100)
        page = render_report(read_report([tmp_path]), "html")
        assert "<dt>regions per image at test</dt><dd>100</dd>" in page
        assert "gfsod<small>base and novel classes are detected together</small>" in page
        assert "<dt>novel classes</dt><dd>2<small>bird, cow</small></dd>" in page
        text = render_report(read_report([tmp_path]), "markdown")
        assert "evaluation VOC-style 11-point (11-point precision of VOC 2007)" in text

    def test_values_that_rows_do_not_share_are_no_common_protocol(self, tmp_path):
        make_run(tmp_path / "a", backbone="R50-C4")
        make_run(tmp_path / "b", backbone="R101-C4")
        section = only_section(tmp_path)
        assert "backbone" not in {fact.name for fact in section.protocol}

    def test_seeds_of_the_few_are_named(self, tmp_path):
        fill(tmp_path, shots=(1, 2, 5), seeds=3)
        next(tmp_path.rglob("5shot_seed2_0/result.json")).unlink()
        notes = only_section(tmp_path, allow_missing=True).notes
        assert notes[:3] == ("Seeds: 0, 1, 2, but", "tfa, 5-shot: seeds 0, 1.", "tfa, 5-shot: WITHOUT seeds 2.")
        assert notes[3].startswith("Some rows have 2 runs")


class TestFiles:
    def test_folder(self, tmp_path):
        fill(tmp_path / "runs")
        files = save_report(read_report([tmp_path / "runs"]), tmp_path / "report", also=["json"])
        assert [file.name for file in files] == ["index.html", "report.md", "report.csv", "report.json"]
        assert files[0].read_text().startswith("<!DOCTYPE html>") and files[1].read_text().startswith("## voc")

    def test_beside_a_page(self, tmp_path):
        fill(tmp_path / "runs")
        files = save_report(read_report([tmp_path / "runs"]), tmp_path / "out" / "a.html", also=["md", "csv"])
        assert [file.name for file in files] == ["a.html", "a.md", "a.csv"]

    def test_a_format_is_a_file_whatever_its_name(self, tmp_path):
        fill(tmp_path / "runs")
        (file,) = save_report(read_report([tmp_path / "runs"]), tmp_path / "plain", style="markdown")
        assert file.read_text().startswith("## voc")

    def test_faults(self, tmp_path):
        fill(tmp_path / "runs")
        sections = read_report([tmp_path / "runs"])
        with pytest.raises(ValueError, match='Unknown format "pdf" beside'):
            save_report(sections, tmp_path / "a.html", also=["pdf"])
        with pytest.raises(ValueError, match="a.pdf: no format has this suffix"):
            save_report(sections, tmp_path / "a.pdf")
        with pytest.raises(ValueError, match="Only an HTML page shows a gallery"):
            save_report(sections, tmp_path / "a.md", galleries=[Gallery("x", (), ())])
        assert not (tmp_path / "a.md").exists()


def broken_run(folder, log="", config=True, name="log.txt"):
    folder.mkdir(parents=True)
    keys = {"RESOLVED": True, "METHOD": "defrcn", "DATASET": "voc", "SETTING": "gfsod", "STAGE": "novel"}
    if config:
        (folder / "config.yaml").write_text(yaml.safe_dump({"FEWSHOT": {**keys, "SHOT": 2, "SEED": 1, "REPEAT": 0}}))
    if log:
        (folder / name).write_text(log)


TRACEBACK = "[date] started\nTraceback (most recent call last):\n  File x\nFloatingPointError: loss is not finite\n"


class TestUnfinished:
    def section(self, folder):
        fill(folder / "done", seeds=2)
        *measured, section = read_report([folder])
        assert [len(row.runs) for part in measured for row in part.rows] == [2, 2]  # and they are averaged nowhere
        return section

    def test_failed_run_is_shown_with_its_error(self, tmp_path):
        broken_run(tmp_path / "bad", TRACEBACK)
        section = self.section(tmp_path)
        (row,) = section.tables[0].rows
        assert row[:6] == ("DeFRCN (defrcn)", "voc", "gfsod", "2", "1", "0")
        assert row[6].endswith("/bad") and row[7] == "failed: FloatingPointError: loss is not finite"
        for style in ("text", "markdown", "html", "json"):
            assert "FloatingPointError" in render_report([section], style)

    def test_run_that_went_on_is_not_called_failed(self, tmp_path):
        broken_run(tmp_path / "on", TRACEBACK + "[date] resumed\n")
        (tmp_path / "on" / "last_checkpoint").write_text("model_0000003.pth")
        assert self.section(tmp_path).tables[0].rows[0][7] == "no result; newest checkpoint model_0000003.pth"

    def test_run_that_failed_before_its_config(self, tmp_path):
        broken_run(tmp_path / "early", "error: no data\n", config=False, name="worker.log")
        assert self.section(tmp_path).tables[0].rows[0][7] == "failed: error: no data"

    def test_other_yaml_files_are_no_runs(self, tmp_path):
        fill(tmp_path / "done", seeds=2)
        (tmp_path / "config.yaml").write_text("FEWSHOT: {METHOD: tfa}\n")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "config.yaml").write_text("a: [1\n")
        assert all(section.rows for section in read_report([tmp_path]))


class TestCurves:
    def test_marks_lie_where_their_values_are(self, tmp_path):
        """One row of 10, 20, 30 (t interval 20 ± 24.84) at 1 shot: the axis goes from 0 to 50."""
        for seed, value in enumerate((10.0, 20.0, 30.0)):
            make_run(tmp_path, seed=seed, nap50=value)
        plot = shots_plot(only_section(tmp_path), "nAP50")
        ticks = re.findall(r'text-anchor="end">([\d.]+)<', plot)
        assert ticks == ["0", "10", "20", "30", "40", "50"]
        bottom = HEIGHT - 36
        places = [float(y) for y in re.findall(r'class="run" cx="[\d.]+" cy="([\d.]+)"', plot)]
        assert places == pytest.approx([bottom - value / 50 * (bottom - TOP) for value in (10, 20, 30)], abs=0.06)
        (mean,) = re.findall(r'class="mark" cx="[\d.]+" cy="([\d.]+)"', plot)
        assert float(mean) == pytest.approx(bottom - 0.4 * (bottom - TOP), abs=0.06)
        (bar,) = re.findall(r'class="bar" d="M[\d.]+ ([\d.]+)V([\d.]+)((?:M[^"]*)?)"', plot)
        upper = 20 + stats.t.ppf(0.975, 2) * 10 / math.sqrt(3)
        assert float(bar[0]) == pytest.approx(bottom) and bar[2].count("h8") == 1  # the lower end is cut: no cap
        assert float(bar[1]) == pytest.approx(bottom - upper / 50 * (bottom - TOP), abs=0.06)
        assert f"tfa, 1-shot: 20.00 ± {upper - 20:.2f} (3 runs)" in plot

    def test_plain_and_calibrated_share_a_colour(self, tmp_path):
        fill(tmp_path / "plain", ("tfa", "other"), seeds=2)
        fill(tmp_path / "pcb", ("tfa",), seeds=2, calibration=PCB)
        section = only_section(tmp_path)
        found = looks(section)
        assert found["tfa"].colour == found["tfa + pcb"].colour != found["other"].colour
        assert [found[label].dashed for label in ("tfa", "tfa + pcb", "other")] == [True, False, False]
        assert legend(section).count("<li>") == 3
        assert shots_plot(section, "nAP50").count('class="bar few"') == 6  # two runs: dotted

    def test_metric_without_value_has_no_panel(self, tmp_path):
        make_run(tmp_path, nap50=math.nan)
        assert shots_plot(only_section(tmp_path), "nAP50") == ""

    def test_differences_lie_about_zero(self, tmp_path):
        for seed in range(3):
            make_run(tmp_path / "plain", seed=seed, nap50=20.0)
            make_run(tmp_path / "pcb", seed=seed, nap50=20.0 + (-2.0, 1.0, 4.0)[seed], calibration=PCB)
        plot = differences_plot(only_section(tmp_path).comparisons, "nAP50")
        zero = float(re.search(r'class="zero" d="M([\d.]+)', plot)[1])
        runs = [float(x) - zero for x in re.findall(r'class="run" cx="([\d.]+)"', plot)]
        assert runs[0] < 0 < runs[1]
        assert runs[2] / runs[1] == pytest.approx(4, abs=0.02) and runs[0] / runs[1] == pytest.approx(-2, abs=0.02)
        assert max(float(x) for x in re.findall(r' x="([\d.]+)"', plot)) <= WIDTH
        assert "higher in 2" in plot
