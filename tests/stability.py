"""How many rows a selector has to read before it says the same again: `python tests/stability.py`.

Each selector reads 8 rows, 16, 32 and so on, three times with rows of their own, and then many rows
once. It is stable from the first number of rows on for which Kendall's tau between the order of the
many and the three is 0.95 or more on average. A selector that answers one budget has no order:
there the share of the layers kept by both counts, over budgets from 2 to half of the layers. What
asking took is in forward passes of one row through all layers.
"""
import argparse
import statistics
from pathlib import Path
from typing import Any

from zoo import RESULTS, TRAINED, Rows, morphable, packed

from flashmorph.model.morph import MorphableModel
from flashmorph.run.asking import ask
from flashmorph.run.subsets import Values
from flashmorph.scores import kendall

STABLE, SEEDS, LEAST = 0.95, (1, 2, 3), 8
METHODS = ("flashmorph", "flashmorph-raw", "flashmorph-swap", "remove-one", "eliminate", "swap",
           "gradient", "add-one", "perplexity", "halo", "halo-jet", "kl-ls")


def of_rows(method: str, rows: int) -> dict[str, Any]:
    "The settings of a selector that reads `rows` rows."
    if method == "kl-ls":                           # by default 8 to measure, 20 steps of 4
        steps = max(1, 10 * rows // 44)
        return {"count": max(1, rows - 4 * steps), "steps": steps}
    if method == "flashmorph-swap": return {"count": rows, "steps": max(1, rows // 4)}
    if method.startswith("flashmorph"): return {"steps": max(1, rows // 4), "batch_size": 4}
    if method == "eliminate": return {"count": rows, "least": min(8, rows)}
    return {"count": rows}


def alike(one: Values, other: Values) -> float:
    "Kendall's tau of two orders, or the share of layers kept by both."
    if one["order"]: return kendall(one["order"], other["order"])
    shares = [len({*kept} & {*other["sets"][k]}) / len(kept) for k, kept in one["sets"].items()]
    return statistics.fmean(shares)


def asked_at(
    model: MorphableModel, rows: Rows, method: str, count: int, seed: int
) -> Values:
    "What a selector that reads `count` rows of a seed gives."
    budgets = range(2, model.num_layers // 2 + 1)
    return ask(model, method, rows(5000 + seed), seed, budgets, **of_rows(method, count))


def stability(model: MorphableModel, rows: Rows, method: str, most: int) -> dict[str, Any]:
    "How alike the answers are at 8 rows, 16 and so on, what they took, and where they are stable."
    many = asked_at(model, rows, method, most, 0)
    counts = [LEAST * 2 ** n for n in range((most // LEAST).bit_length() - 1)]
    found = [[asked_at(model, rows, method, count, seed) for seed in SEEDS] for count in counts]
    tau = [statistics.fmean(alike(many, one) for one in several) for several in found]
    passes = [statistics.fmean(one["passes"] for one in several) for several in found]
    enough = [n for n in range(len(counts)) if min(tau[n:]) >= STABLE]
    return {"method": method, "rows": counts, "tau": [round(x, 3) for x in tau],
            "passes": [round(x) for x in passes],
            "stable": counts[enough[0]] if enough else None,
            "passes when stable": round(passes[enough[0]]) if enough else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--names", default=",".join(TRAINED))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--most", type=int, default=1024)
    parser.add_argument("--teachers", type=Path, help="folder that keeps trained teachers")
    parser.add_argument("--json", type=Path, default=RESULTS / "stability.json")
    asked = parser.parse_args()
    found: dict[str, Any] = {"most": asked.most}
    for name in asked.names.split(","):
        model, rows = morphable(name, folder=asked.teachers)
        found[name] = []
        for method in asked.methods.split(","):
            found[name].append(stability(model, rows, method, asked.most))
            print(name, found[name][-1], flush=True)
            asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
