#!/usr/bin/env python3
"""Look at a class memory and edit it, without training.

    python tools/class_memory.py list RUN/class_memory
    python tools/class_memory.py compare OLD/class_memory NEW/class_memory
    python tools/class_memory.py rename RUN/class_memory aeroplane airplane
    python tools/class_memory.py remove RUN/class_memory cow sofa
    python tools/class_memory.py copy RUN/class_memory --source OTHER/class_memory bus
    python tools/class_memory.py replace RUN/class_memory --source OTHER/class_memory bus bird

A memory is a pair of files, NAME.safetensors and NAME.json; give NAME or either file. An edit replaces the pair, or
writes another one with --output. Classes are copied only between memories of one kind and one encoder.
"""

from __future__ import annotations

import argparse
import sys

from fsdet.modeling.class_memory import ClassMemory


def main(argv: list[str] | None = None) -> int:
    """Print, or edit and tell what was written."""
    args = _parser().parse_args(argv)
    try:
        memory = ClassMemory.load(args.memory)
        if args.command == "list":
            print(memory.summary())
            return 0
        if args.command == "compare":
            print(memory.compare(ClassMemory.load(args.other)).table())
            return 0
        if args.command == "rename":
            memory.rename(args.old, args.new)
        elif args.command == "remove":
            for name in args.names:
                memory.remove(name)
        else:
            memory.copy_from(ClassMemory.load(args.source), args.names, replace=args.command == "replace")
        memory.save(args.output or args.memory)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.output or args.memory}: {len(memory)} classes written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "list": "classes with shots, pictures, tensors and digest",
        "compare": "classes added, removed and changed, with cosine and relative distance",
        "rename": "give a class another name",
        "remove": "forget classes",
        "copy": "add classes of another memory",
        "replace": "exchange classes for those of another memory",
    }
    parsers = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for name, command in parsers.items():
        command.add_argument("memory", help="common name of the two files, or one of them")
        if name in ("rename", "remove", "copy", "replace"):
            command.add_argument("--output", help="write here and leave the memory as it is")
        if name in ("copy", "replace"):
            command.add_argument("--source", required=True, help="memory to take the classes from")
        if name in ("remove", "copy", "replace"):
            command.add_argument("names", nargs="+", metavar="CLASS")
    parsers["compare"].add_argument("other", help="the memory to compare it with")
    parsers["rename"].add_argument("old")
    parsers["rename"].add_argument("new")
    return parser


if __name__ == "__main__":
    sys.exit(main())
