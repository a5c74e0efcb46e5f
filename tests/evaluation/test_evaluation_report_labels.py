"""What readers, files and the command line call rows, test sets and calibrations."""

import pytest
from evaluation_cases import make_run

from fsdet.evaluation.report import build_report, load_results, read_report, render_report
from fsdet.evaluation.report_labels import calibration_words, method_name

PCB, OTHER = "pcb resnet50_msra:7bb5dae1 0.5", "pcb resnet101:5d3b4d8f 0.7"
WORDS = (
    "prototypical calibration with the network resnet50_msra (its weights file's SHA-256 starts with 7bb5dae1) and "
    "weight 0.5 for the detector's score"
)
NO_DIGEST = "prototypical calibration with the network resnet101 and weight 0.5 for the detector's score"
KEY = f'"+ pcb" stands for "{PCB}": {WORDS}.'
LISTED = "voc_test_all1:test160:25062e99"


def only_section(folder):
    (section,) = build_report(load_results([folder]))
    return section


def facts(section):
    return {fact.name: (fact.value, fact.meaning) for fact in section.protocol}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("frcn_ft_full", "FRCN+ft-full (frcn_ft_full)"),
        ("tfa_cos", "TFA w/ cos (tfa_cos)"),
        ("fewx_direct", "FewX (fewx_direct)"),
        ("mine", "mine"),
    ],
)
def test_names_stand_beside_known_ids(method, name):
    assert method_name(method) == name


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (PCB, WORDS),
        ("pcb resnet101 0.5", NO_DIGEST),
        (f"{PCB} 0.1-1 all", f"{WORDS}; other settings: 0.1-1 all"),
        ("sharpened 2", ""),
    ],
)
def test_calibrations_in_words(calibration, words):
    assert calibration_words(calibration) == words


def test_one_calibration_is_short_and_explained_once(tmp_path):
    for method in ("tfa_cos", "mine"):
        make_run(tmp_path / "plain", method)
        make_run(tmp_path / "pcb", method, nap50=40.0, calibration=PCB)
    section = only_section(tmp_path)
    assert section.labels == ("mine", "mine + pcb", "TFA w/ cos (tfa_cos)", "TFA w/ cos (tfa_cos) + pcb")
    assert [section.naming.full(row) for row in section.rows] == [
        "mine",
        f"mine + {PCB}",
        "tfa_cos",
        f"tfa_cos + {PCB}",
    ]
    for style in ("text", "brief", "markdown"):
        text = render_report([section], style)
        assert text.count(KEY) == 1 and text.count("7bb5dae1") == 2, style
    page = render_report([section], "html")
    assert page.count("weights file&#x27;s SHA-256 starts with 7bb5dae1") == 1 and page.count("7bb5dae1") == 2


def test_key_follows_the_headline_tables(tmp_path):
    make_run(tmp_path / "plain")
    make_run(tmp_path / "pcb", calibration=PCB)
    text = render_report([only_section(tmp_path)], "markdown")
    assert text.index("### AP50 by shots") < text.index(KEY) < text.index("### Calibration (pcb)")


def test_two_calibrations_stay_in_full(tmp_path):
    make_run(tmp_path / "a", calibration=PCB)
    make_run(tmp_path / "b", calibration=OTHER)
    section = only_section(tmp_path)
    assert set(section.labels) == {f"tfa + {PCB}", f"tfa + {OTHER}"}
    key = list(section.naming.key())
    assert len(key) == 2 and f'"{PCB}": {WORDS}.' in key


def test_what_all_rows_share_is_no_label_but_protocol(tmp_path):
    make_run(tmp_path, calibration=PCB)
    section = only_section(tmp_path)
    assert section.labels == ("tfa",) and not list(section.naming.key())
    assert facts(section)["calibration"] == (PCB, WORDS)
    (row,) = section.rows
    assert section.naming.accepted(row) == {"tfa", f"tfa + {PCB}"}


def test_listed_test_images_in_words(tmp_path):
    make_run(tmp_path, test_set=LISTED, test_images=160, evaluation="coco", base_model="3636d8f6bc9f")
    section = only_section(tmp_path)
    assert section.title == (
        "voc split 1, gfsod: 160 images of voc_test_all1 listed in test160 (digest 25062e99), COCO-style evaluation"
    )
    found = facts(section)
    assert found["test set"] == ("160 images listed in test160 (digest 25062e99)", "of voc_test_all1")
    assert found["evaluation"][0] == "COCO-style"
    assert found["base model"] == ("3636d8f6bc9f", "start of its file's SHA-256")
    page = render_report([section], "html")
    assert LISTED not in page and "<dd>coco" not in page


@pytest.mark.parametrize(
    ("test_set", "words"),
    [
        ("voc_test_all1", "480 images of voc_test_all1"),
        ("coco_test_all:instances_val2017", "480 images of coco_test_all (instances_val2017)"),
        (
            "coco_test_all:val:few:00ff00ff",
            "480 images of coco_test_all (val) listed in few (digest 00ff00ff)",
        ),
    ],
)
def test_titles_name_the_test_set(tmp_path, test_set, words):
    make_run(tmp_path, test_set=test_set, evaluation="voc-area")
    assert only_section(tmp_path).title == f"voc split 1, gfsod: {words}, VOC-style area evaluation"


def test_tables_of_numbers_keep_the_ids(tmp_path):
    make_run(tmp_path, "tfa_cos", test_set=LISTED, evaluation="coco", calibration=PCB)
    text = render_report(read_report([tmp_path]), "csv")
    assert all(f",{value}," in text for value in ("tfa_cos", LISTED, "coco", PCB))
    assert "TFA w/ cos" not in text
