"""The sets that `flashmorph compare RUN` found, distilled alike: `tests/run_distilled.py RUN`.

Of the methods that are asked for, the hybrid of each set at one budget is distilled as the run's
recipe says, but for fewer steps, three times with other rows, and measured on held-out books. A
set that two methods keep is distilled once; a run that was killed goes on.
"""
import argparse
import itertools
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from zoo import RESULTS, packed
from zoo_distilled import rounded

from flashmorph.folder import Run
from flashmorph.measure.evaluate import HELD_OUT, held_out_rows
from flashmorph.model.morph import MorphableModel
from flashmorph.run.materials import Materials
from flashmorph.run.ranking import branches_of
from flashmorph.run.subsets import MEASURES, HeldOut, Values
from flashmorph.store import read_json
from flashmorph.train.distill import distill


def once_distilled(
    held: HeldOut, materials: Materials, model: MorphableModel, layers: list[int], steps: int,
    seed: int,
) -> Values:
    "The numbers of the hybrid of some layers after a distillation, by book."
    recipe = materials.recipe
    hybrid = model.commit(layers, full_rope=recipe.full_rope, logit_scale=recipe.logit_scale)
    config = replace(recipe.distill, steps=steps, seed=seed)
    distill(hybrid, materials.teacher, materials.rows(9000 + seed, "distill"), config,
            progress=False)
    return held.measure(hybrid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a run that `flashmorph compare` has compared")
    parser.add_argument("--budget", type=int, default=8)
    parser.add_argument("--methods", default="flashmorph-swap,eliminate,swap,remove-one,uniform")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=32, help="held-out books")
    parser.add_argument("--json", type=Path, default=RESULTS / "distilled_smollm2.json")
    asked = parser.parse_args()
    run = Run(asked.run)
    materials, model = branches_of(run)
    kept = read_json(run.path("selections.json"), "a comparison")["kept"]
    sets = {one["method"]: one["layers"] for one in kept
            if len(one["layers"]) == asked.budget and one["seed"] == 0}
    rows, _ = held_out_rows(materials.tokenizer, materials.recipe.evaluate, HELD_OUT)
    held = HeldOut(model, rows, asked.count, batch_size=4, log=run.path("distilled.jsonl"))

    def means(values: Values) -> dict[str, float]:
        return {name: rounded(statistics.fmean(values[name])) for name in MEASURES}
    found: dict[str, Any] = {"budget": asked.budget, "steps": asked.steps, "books": held.count}
    found["sets"] = [{"method": method, "layers": sets[method], "before": means(held(sets[method])),
                      "after": []} for method in asked.methods.split(",")]
    for seed, one in itertools.product(range(asked.seeds), found["sets"]):
        work = partial(once_distilled, held, materials, model, one["layers"], asked.steps, seed)
        facts = [*one["layers"], f"{asked.steps} steps", seed]
        one["after"].append(means(held.once("distilled", facts, work)))
        print(json.dumps(one), flush=True)
        asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
