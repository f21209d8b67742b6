"""What being native costs: `python tests/native_cost.py --layers 5,8,12 RUN RUN RUN` compares runs.

Each run is a conversion of the same teacher with a mixer of its own, trained alike in stage 1. The
same layers stay full in all of them. Their hybrids are measured as they are and after the same
distillation, on held-out books as long as those that gates read.
"""
import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo import RESULTS, packed

from flashmorph.folder import Run
from flashmorph.measure.evaluate import HELD_OUT, held_out_rows
from flashmorph.run.compare import measured, repairer
from flashmorph.run.ranking import branches_of
from flashmorph.run.subsets import MEASURES, HeldOut, Values


def means(values: Values, after: str = "") -> dict[str, float]:
    "The mean over the books of each measure, of those called `kl, distilled` and so on if asked."
    return {name: round(statistics.fmean(values[name + after]), 5) for name in MEASURES}


def errors_of(run: Run) -> dict[str, float]:
    "The mean relative error of the linear branches after the start, and in the last 20 steps."
    lines = run.path("log.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if event["stage"] == "align"]
    losses = [event["loss"] for event in events]
    return {"start": round(losses[0], 5), "aligned": round(statistics.fmean(losses[-20:]), 5)}


def cost(run: Run, layers: list[int], steps: int, count: int) -> dict[str, Any]:
    "The alignment of a run, and its hybrid with these layers before and after distillation."
    materials, model = branches_of(run)
    books = materials.recipe.passkeys
    sizes = {name: books[name] for name in ("length", "keys", "words_per_key")}
    rows, _ = held_out_rows(
        materials.tokenizer, replace(materials.recipe.evaluate, **sizes), HELD_OUT)
    held = HeldOut(model, rows, count, batch_size=4, log=run.path("compare.jsonl"))
    [values] = measured(held, [layers], steps, repairer(materials, model, steps), print).values()
    return {"mixer": materials.recipe.mixer, **errors_of(run),
            "teacher": means(held(range(model.num_layers))), "zero-shot": means(values),
            "distilled": means(values, ", distilled")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--layers", required=True, help="those that stay full, as 5,8,12")
    parser.add_argument("--steps", type=int, default=50, help="of the distillation")
    parser.add_argument("--count", type=int, default=64, help="held-out books")
    parser.add_argument("--json", type=Path, default=RESULTS / "native_smollm2_cpu.json")
    asked = parser.parse_args()
    layers = [int(layer) for layer in asked.layers.split(",")]
    found: dict[str, Any] = {"layers": layers, "steps": asked.steps, "books": asked.count,
                             "runs": []}
    for folder in asked.runs:
        found["runs"].append(cost(Run(folder), layers, asked.steps, asked.count))
        print(found["runs"][-1], flush=True)
        asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
