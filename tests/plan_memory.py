"""The memory that a plan predicts, beside what a run on this CPU holds at its peak in each stage:
python tests/plan_memory.py TEACHER --run NAME --json FILE.

Measured is what the process holds, less what it held before the teacher was loaded: the libraries
are there after a conversion in small. The C library gives the memory of each large tensor back at
once, as MALLOC_MMAP_THRESHOLD_ asks it to, so that only tensors count. With --slack it decides by
itself, and the process holds more than its tensors."""
import argparse
import gc
import json
import os
import sys
import tempfile
from pathlib import Path

from flashmorph.measure.machines import Machine
from flashmorph.measure.plan import plan
from flashmorph.run.convert import convert
from flashmorph.run.recipe import recipe_from_dict

THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
STAGE = {"steps": 2, "batch_size": 2, "precision": "no"}      # the second step has the states
RUNS = {
    "2 rows of 512": {},
    "2 rows of 512, recomputed": {"recompute": True},
    "2 rows of 512, bf16": {"precision": "bf16"},
    "8 rows of 1024": {"length": 1024, "batch_size": 8},
    "8 rows of 1024, recomputed": {"length": 1024, "batch_size": 8, "recompute": True},
}


def recipe_of(teacher, length=512, recompute=False, **stage):
    table = {**STAGE, **stage}
    again = {**table, "recompute": recompute}
    return recipe_from_dict({
        "teacher": teacher, "mixer": "lightning", "text": {"length": length},
        "passkeys": {"length": length, "keys": 2, "words_per_key": 3},
        "rank": {"reach": 0},           # no stage that trains, and many passes
        "align": {**table, "start": "copy"}, "gates": again, "distill": again, "finetune": again,
        "evaluate": {"books": 1, "batch_size": 1, "length": 256}})


def resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def convert_small() -> None:
    "Imports whatever a conversion imports on its way."
    with tempfile.TemporaryDirectory() as folder:
        convert(recipe_of("bundled", 192), Path(folder) / "run", progress=False)
    gc.collect()


def run(teacher, settings):
    recipe = recipe_of(teacher, **settings)
    predicted = {s.stage: s for s in plan(recipe, rate=1e11, machine=Machine("cpu")).stages}
    convert_small()
    before = resident()
    with tempfile.TemporaryDirectory() as folder:
        spent = convert(recipe, Path(folder) / "run", progress=False)["spent"]
    rows = []
    for stage, taken in spent.items():
        held = taken["peak_memory"] - before
        ratio = predicted[stage].memory / held
        rows.append({"stage": stage, "predicted": predicted[stage].memory, "measured": held,
                     "ratio": round(ratio, 3)})
        print(f"{stage:20} predicted {predicted[stage].memory / 1e6:7.1f} MB, measured "
              f"{held / 1e6:7.1f} MB, ratio {ratio:.3f}", predicted[stage].parts.row(), flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher")
    parser.add_argument("--run", choices=RUNS, required=True)
    parser.add_argument("--name", default="the teacher", help="what the file calls the teacher")
    parser.add_argument("--slack", action="store_true", help="leave the C library as it is")
    parser.add_argument("--json", type=Path, help="add the result to this file")
    asked = parser.parse_args()
    if not asked.slack and THRESHOLD not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, THRESHOLD: "131072"})
    found = run(asked.teacher, RUNS[asked.run])
    if asked.json:
        known = json.loads(asked.json.read_text()) if asked.json.exists() else {}
        known[f"{asked.name}, {asked.run}{', with slack' if asked.slack else ''}"] = found
        asked.json.write_text(json.dumps(known, indent=1) + "\n")
