"""Do selectors that read longer books find better sets? `python tests/longer_books.py RUN`.

On the branches of a run, selectors read books as long as those that a comparison holds out. Each
set stands beside the one that `flashmorph compare RUN` found with the same selector and shorter
books, on the same held-out books. Gates are trained as the run's recipe says, and their order is
kept as it is and after an exchange around its cut. A set of the comparison is not measured again.
"""
import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from zoo import RESULTS, packed

from flashmorph.choose.rank import rank
from flashmorph.choose.search import Exchange, exchange
from flashmorph.data.passkeys import passkeys
from flashmorph.folder import Run
from flashmorph.measure.evaluate import HELD_OUT, held_out_rows
from flashmorph.model.morph import MorphableModel
from flashmorph.run.confidence import less, mean_of
from flashmorph.run.materials import Materials
from flashmorph.run.ranking import branches_of
from flashmorph.run.subsets import HeldOut
from flashmorph.store import read_json

Order = tuple[str, tuple[int, ...]]


def books_of(materials: Materials) -> Any:
    "Passkey books for selectors, of the shape of the held-out ones."
    recipe = materials.recipe
    sizes = {name: recipe.evaluate[name] for name in ("length", "keys", "words_per_key")}
    settings = vars(replace(recipe.passkeys, min_length=None, **sizes))
    return passkeys(materials.tokenizer, **settings, seed=recipe.seed)


def chosen(
    materials: Materials, model: MorphableModel, budgets: Sequence[int], log: Path
) -> Iterator[Order]:
    "The sets that selectors keep after reading the longer books, by method and budget."
    recipe = materials.recipe
    gates = recipe.gates
    start = rank(model, books_of(materials), "flashmorph", steps=gates.steps,
                 batch_size=gates.batch_size, seed=recipe.seed, progress=False)
    for k in budgets: yield "flashmorph", start.select(k).layers
    for k in budgets:
        found = exchange(model, books_of(materials), start, k, Exchange(), log)
        yield "flashmorph-swap", found.select(k).layers
    found = rank(model, books_of(materials), "remove-one", log=log)
    for k in budgets: yield "remove-one", found.select(k).layers
    for k in budgets:
        found = rank(model, books_of(materials), "swap", log=log, budget=k)
        yield "swap", found.select(k).layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", help="a run that `flashmorph compare` has compared")
    parser.add_argument("--budgets", default="8,12,16,22")
    parser.add_argument("--log", type=Path, default=Path("longer.jsonl"))
    parser.add_argument("--json", type=Path, default=RESULTS / "longer_books_smollm2.json")
    asked = parser.parse_args()
    run = Run(asked.run)
    materials, model = branches_of(run)
    compared = read_json(run.path("selections.json"), "a comparison")
    held_rows, _ = held_out_rows(materials.tokenizer, materials.recipe.evaluate, HELD_OUT)
    settings = compared["settings"]
    held = HeldOut(model, held_rows, settings["count"], batch_size=settings["batch_size"],
                   log=run.path("compare.jsonl"))
    short = {(one["method"], len(one["layers"])): tuple(one["layers"])
             for one in compared["kept"] if one["seed"] == 0}
    budgets = [int(k) for k in asked.budgets.split(",")]
    sets: list[dict[str, Any]] = []
    found = {"budgets": budgets, "books": held.count, "sets": sets}
    for method, layers in chosen(materials, model, budgets, asked.log):
        before, after = held(short[method, len(layers)])["kl"], held(layers)["kl"]
        sets.append({"method": method, "layers": list(layers), "kl": asdict(mean_of(after)),
                     "less than with shorter books": asdict(mean_of(less(before, after)))})
        print(json.dumps(sets[-1]), flush=True)
        asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
