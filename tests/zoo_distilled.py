"""The sets that selectors keep on the zoo, each distilled alike: `python tests/zoo_distilled.py`.

Reads `nbs/results/zoo_NAME_MIXER.json` of `tests/zoo.py`, makes the hybrid of every set that any
selector keeps there, distils each three times on rows of its own, and measures it on the held-out
rows. The result is `nbs/results/distilled_zoo.json`.
"""
import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from zoo import RESULTS, TRAINED, Rows, morphable, packed

from flashmorph.model.morph import MorphableModel
from flashmorph.run.subsets import MEASURES, HeldOut, Values
from flashmorph.train.distill import distill

SEEDS = (1, 2, 3)


def once_distilled(
    held: HeldOut, rows: Rows, layers: list[int], seed: int, settings: dict[str, Any]
) -> Values:
    "The numbers of the hybrid of some layers after a distillation, by row."
    hybrid = held.model.commit(layers)
    distill(hybrid, held.model, rows(9000 + seed), seed=seed, progress=False, **settings)
    return held.measure(hybrid)


def distilled(
    model: MorphableModel, rows: Rows, sets: list[list[int]], log: Path | None,
    settings: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    "What each set measures before and after distillation, a number for each seed."
    held = HeldOut(model, rows(1_000_000), 256, batch_size=64, log=log)
    for layers in sets:
        before = held(layers)
        found: dict[str, Any] = {"layers": layers, "kl before": statistics.fmean(before["kl"])}
        values = [held.once("distilled", [*layers, seed, *map(str, settings.values())],
                            partial(once_distilled, held, rows, layers, seed, settings))
                  for seed in SEEDS]
        for name in MEASURES: found[name] = [statistics.fmean(one[name]) for one in values]
        yield {name: rounded(value) for name, value in found.items()}


def rounded(value: Any) -> Any:
    if isinstance(value, list): return [rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(TRAINED))
    parser.add_argument("--mixers", default="lightning,gdn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4, help="falls to a tenth")
    parser.add_argument("--teachers", type=Path, help="folder that keeps trained teachers")
    parser.add_argument("--log", type=Path, help="keeps every measurement, to go on from")
    parser.add_argument("--json", type=Path, default=RESULTS / "distilled_zoo.json")
    asked = parser.parse_args()
    settings = {"steps": asked.steps, "batch_size": asked.batch_size, "lr": asked.lr,
                "lr_end": asked.lr / 10}
    found: dict[str, Any] = {**settings, "seeds": len(SEEDS)}
    for name in asked.names.split(","):
        for mixer in asked.mixers.split(","):
            known = json.loads((RESULTS / f"zoo_{name}_{mixer}.json").read_text(encoding="utf-8"))
            sets = sorted({tuple(one["layers"]) for one in known["kept"]})
            model, rows = morphable(name, mixer, asked.teachers)
            found[f"{name} {mixer}"] = list(distilled(
                model, rows, [list(one) for one in sets], asked.log, settings))
            print(name, mixer, len(sets), flush=True)
            asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
