#!/usr/bin/env python3
r"""Bring an official checkpoint (.pth, .pkl, .safetensors) to this project's names, as .pth or .safetensors.

    python tools/convert_checkpoint.py --table tfa --src official.pth --output ours.safetensors \
        --config-file configs/tfa/voc_cos.yaml

With --config-file the model is built and every tensor on either side must find its partner.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fsdet.checkpoint.rename import TABLES, convert_file


def main(argv: list[str] | None = None) -> int:
    """Convert, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=sorted(TABLES), required=True, help="whose names the file uses")
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help=".pth or .safetensors")
    parser.add_argument("--config-file", help="configuration of the model that will load the result")
    parser.add_argument("--model", help="another network for the same configuration, e.g. r50_c4")
    parser.add_argument("--allow-unmatched", action="store_true", help="convert even when keys remain on either side")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="[KEY VALUE ...]", help="overrides of it")
    args = parser.parse_args(argv)
    try:
        model_state, record = _expected(args) if args.config_file else (None, {})
        report = convert_file(
            args.src,
            args.output,
            TABLES[args.table],
            model_state=model_state,
            allow_unmatched=args.allow_unmatched,
            record=record,
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 1
    print(report.describe())
    print(f"{args.output}: written" + ("" if args.config_file else " (not compared with a model: no --config-file)"))
    return 0


def _expected(args: argparse.Namespace) -> tuple[dict, dict]:
    """State dict of the configured model, and the class names of its predictor's rows."""
    # Building a detector takes seconds and is not needed to rename keys.
    from detectron2.modeling import build_model

    from fsdet.engine.setup import load_config, run_classes

    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts], model=args.model)
    return build_model(cfg).state_dict(), {"classes": run_classes(cfg)}


if __name__ == "__main__":
    sys.exit(main())
