"""The tables of `nbs/results/ruler_*.json`: RULER's scores of a teacher and of its hybrid.

    python tests/ruler_tables.py TEACHER HYBRID --out nbs/results/ruler_NAME.json

TEACHER and HYBRID are folders, or `bundled`. Each cell is kept as soon as it is measured, and a
table that was interrupted goes on where it stopped."""
import argparse
import json
import sys
import time
from itertools import product
from pathlib import Path

import torch

from flashmorph.longtasks import NEEDLE_TASKS, TooShort
from flashmorph.measure.ruler import ruler
from flashmorph.model.teacher import load_model
from flashmorph.store import write_aside


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="teacher, then hybrid")
    parser.add_argument("--names", nargs="+", default=["teacher", "hybrid"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=10)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--source", default="stories", help="text of the haystacks")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def measured(model, tokenizer, task: str, length: int, args: argparse.Namespace) -> dict:
    "The record of one cell; with a note and no score, if the length is too short for the task."
    try:
        return ruler(model, tokenizer, tasks=[task], lengths=[length], samples=args.samples,
                     batch_size=args.batch_size, source=args.source).record()
    except TooShort as error:
        cell = {"task": task, "length": length, "score": None, "recall": None, "note": str(error)}
        return {"facts": {}, "cells": [cell]}


def main() -> None:
    args = arguments()
    kept = json.loads(args.out.read_text()) if args.out.is_file() else {}
    dtype = args.dtype and getattr(torch, args.dtype)
    loaded = {name: load_model(place, dtype=dtype) for name, place in zip(args.names, args.models)}
    for length, name, task in product(args.lengths, loaded, NEEDLE_TASKS):
        table = kept.setdefault(name, {"facts": {}, "cells": []})
        if (task, length) in [(cell["task"], cell["length"]) for cell in table["cells"]]: continue
        began = time.time()
        found = measured(*loaded[name], task, length, args)
        table["facts"] |= found["facts"] | {"source": Path(args.source).name}
        table["cells"] += found["cells"]
        text = json.dumps(kept, indent=1) + "\n"
        write_aside(args.out, lambda path, text=text: path.write_text(text))
        seconds = time.time() - began
        print(f"{name} {task} {length}: {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
