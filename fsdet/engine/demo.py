"""The main job in minutes: base training, surgery, K-shot fine-tuning over several seeds, table, pictures, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fsdet.data.catalog import load_records
from fsdet.data.drawing import Section, contact_sheet, crop_around, draw_marks
from fsdet.data.quickstart import make_quickstart
from fsdet.data.support import SupportSet
from fsdet.engine.detection import Detection
from fsdet.engine.predictor import Predictor
from fsdet.engine.setup import dataset_sources, dataset_specs, load_config, run_classes
from fsdet.engine.sweep import Sweep, run_sweep
from fsdet.evaluation.ground_truth import Detections, ground_truth_from_records
from fsdet.evaluation.report import write_report
from fsdet.evaluation.report_gallery import verdict_marks
from fsdet.evaluation.report_labels import method_name
from fsdet.evaluation.result import read_result

# The base training of the two-minute form.
SHORT = ("SOLVER.MAX_ITER", "80", "SOLVER.STEPS", "(60,)")


def run_demo(configs: Path, output: Path, *, short: bool = False, say: Callable[[str], None]) -> dict[str, Path]:
    """Make the embedded data set, run the sweep, draw and report.

    Args:
        configs: folder with demo/base.yaml, demo/cos.yaml and demo/ft_full.yaml.
        output: folder of everything that is made.
        short: about two minutes, to see that all parts work; the figures mean nothing then.
        say: receives lines for the user.
    Returns: what to look at: "report", "pictures" and "run", the folder of the run that drew them.
    """
    started = time.perf_counter()
    say("1/4  Data: handwritten digits in textured scenes, six base and four novel classes")
    data = make_quickstart(output / "data")
    say("2/4  Base training, surgery, fine-tuning (logs in the run folders)")
    methods = ("cos",) if short else ("ft_full", "cos")
    sweep = Sweep(
        base=str(configs / "demo" / "base.yaml"),
        novel=tuple(str(configs / "demo" / f"{name}.yaml") for name in methods),
        shots=(1, 5),
        seeds=(0,) if short else (0, 1, 2),
        opts=("FEWSHOT.ROOT", str(data.root), "FEWSHOT.OUTPUT", str(output)),
        base_opts=SHORT if short else (),
    )
    results = run_sweep(sweep, quiet=True, on_result=lambda path: say(f"     {describe(path, output)}"))
    say("3/4  Pictures: what the 5-shot detector finds on test pictures")
    run_folder = results[-1].parent
    pictures = draw_sheet(run_folder, output / "detections.jpg")
    say("4/4  Report")
    report = output / "report.html"
    write_report(results, report, style="html", seeds=sweep.seeds)
    say("\n" + write_report(results, style="brief", metrics=("nAP50", "bAP50"), seeds=sweep.seeds))
    say(f"Done in {time.perf_counter() - started:.0f} s.")
    return {"report": report, "pictures": pictures, "run": run_folder}


def describe(path: Path, output: Path) -> str:
    """One line about a finished run."""
    result = read_result(path)
    metrics = ", ".join(f"{key} {result.metrics[key]:.1f}" for key in ("nAP50", "bAP50") if key in result.metrics)
    return f"{path.parent.relative_to(output)}: {metrics} ({sum(result.seconds.values()):.0f} s)"


def draw_sheet(run_folder: Path, path: Path, *, count: int = 8, threshold: float = 0.4) -> Path:
    """Contact sheet of one run: its novel supports above its detections on test pictures with novel objects."""
    cfg = load_config(str(run_folder / "config.yaml"))
    names = run_classes(cfg)
    train, test = (load_records(spec, dataset_sources(cfg)) for spec in dataset_specs(cfg))
    predictor = Predictor.from_run(run_folder, threshold=threshold)
    supports = SupportSet.from_records(train, names)
    crops, captions = [], []
    for name in predictor.novel_names:
        for support in supports.shots(name)[:3]:
            with Image.open(support.file_name) as image:
                box = tuple(float(value) for value in support.box)
                crops.append(draw_marks(crop_around(image, box, margin=0.6), []))
            captions.append(name)
    novel_ids = {names.index(name) for name in predictor.novel_names}
    shown = [r for r in test if novel_ids & {a["category_id"] for a in r["annotations"]}][:count]
    drawn = draw_judged(shown, [predictor(record["file_name"]) for record in shown], names)
    below = f"Detections on test pictures, score at least {threshold}: green right, orange wrong, yellow missed"
    sheet = contact_sheet(
        [
            Section(
                crops, captions, title="Supports: examples of the novel classes that fine-tuning has seen", columns=12
            ),
            Section(drawn, title=below, columns=4),
        ],
        title=f"{method_name(cfg.FEWSHOT.METHOD)}, {cfg.FEWSHOT.SHOT} shots, seed {cfg.FEWSHOT.SEED}",
    )
    sheet.save(path, quality=90)
    return path


def draw_judged(
    records: Sequence[dict[str, Any]], found: Sequence[Sequence[Detection]], names: Sequence[str]
) -> list[Image.Image]:
    """Annotated pictures with the detections in each, coloured as in the report's gallery.

    Args:
        records: Detectron2 records of the pictures.
        found: detections of each picture.
        names: classes by the category ids of the records.
    """
    rows = [(index, detection) for index, detections in enumerate(found) for detection in detections]
    detections = Detections(
        image_index=np.array([index for index, _ in rows], dtype=np.int64),
        boxes=np.array([detection.box for _, detection in rows], dtype=np.float64).reshape(-1, 4),
        scores=np.array([detection.score for _, detection in rows], dtype=np.float64),
        class_ids=np.array([names.index(detection.class_name) for _, detection in rows], dtype=np.int64),
    )
    judged = verdict_marks(ground_truth_from_records(records, names), detections)
    drawn = []
    for record, marks in zip(records, judged, strict=True):
        with Image.open(record["file_name"]) as image:
            drawn.append(draw_marks(image, marks, min_side=250))  # about the width of a tile
    return drawn
