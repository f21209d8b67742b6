"""Are heads a better unit than layers? `python tests/head_gates.py RUN` asks one out, head by head.

A group of heads that share their keys and values is the least that can keep a cache of its own.
Each group of the run's teacher turns linear alone, and the answers say how much they miss it; the
groups missed most stay full. Then sets of groups are compared with sets of layers of the same
cache, on books that neither has read.
"""
import argparse
import contextlib
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import RESULTS, packed

from flashmorph.choose.ablate import AnswerDivergence, remove_one
from flashmorph.folder import Run
from flashmorph.model.morph import MorphableModel
from flashmorph.run.compare import HELD_OUT, branches_of, held_out_rows
from flashmorph.run.subsets import HeldOut

Head = tuple[int, int]                                  # a layer, and a group of its heads


def kept_part(module: torch.nn.Module, shares: Tensor) -> Any:
    "A hook before an output projection: each group of heads counts with its share."
    def scaled(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        width = x.shape[-1] // len(shares)
        return (x * shares.to(x.dtype).repeat_interleave(width), *inputs[1:])
    return module.register_forward_pre_hook(scaled)


@contextlib.contextmanager
def only_heads(model: MorphableModel, heads: Sequence[Head]) -> Iterator[None]:
    "Inside, these groups of heads are full and all others linear."
    groups = model.config.num_key_value_heads
    before, hooks = [layer.forced for layer in model.layers], []
    gates = model.gates
    model.gates = 0.5
    try:
        for i, layer in enumerate(model.layers):
            full = torch.tensor([float((i, group) in heads) for group in range(groups)])
            layer.forced = float(full[0]) if (full == full[0]).all() else None
            if layer.forced is not None: continue
            # both branches count half, so twice a share is right
            hooks.append(kept_part(layer.full.o_proj, 2 * full))
            hooks.append(kept_part(layer.linear.attn.o_proj, 2 - 2 * full))
        yield
    finally:
        for hook in hooks: hook.remove()
        for layer, forced in zip(model.layers, before): layer.forced = forced
        model.gates = gates


def of_layers(layers: Sequence[int], groups: int) -> list[Head]:
    "All groups of some layers."
    return [*itertools.product(layers, range(groups))]


def missed(model: MorphableModel, far: HeldOut, every: Sequence[Head]) -> dict[Head, float]:
    "For each group, the answer KL when it alone is linear."
    found = {}
    for head in every:
        with only_heads(model, [one for one in every if one != head]):
            found[head] = statistics.fmean(far.measure(model)["kl"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--budgets", default="8,12,16,22")
    parser.add_argument("--read", type=int, default=8, help="books that the scores are read from")
    parser.add_argument("--count", type=int, default=64, help="held-out books")
    parser.add_argument("--json", type=Path, default=RESULTS / "head_gates.json")
    asked = parser.parse_args()
    materials, model = branches_of(Run(asked.run))
    groups = model.config.num_key_value_heads
    every = of_layers(range(model.num_layers), groups)
    books = list(itertools.islice(materials.books(materials.recipe.seed), asked.read))
    layers = remove_one(AnswerDivergence(model, books))
    scores = missed(model, HeldOut(model, books), every)
    order = sorted(every, key=lambda head: (-scores[head], head))
    print([[i, group, round(scores[i, group], 5)] for i, group in order])
    rows, _ = held_out_rows(materials.tokenizer, materials.recipe.evaluate, HELD_OUT)
    held = HeldOut(model, rows, asked.count, batch_size=4)
    found: dict[str, Any] = {
        "layers": model.num_layers, "groups of heads": groups, "books read": asked.read,
        "held-out books": asked.count, "order of layers": layers.order, "order of heads": order,
        "budgets": []}
    for budget in map(int, asked.budgets.split(",")):
        one: dict[str, Any] = {"budget": budget}
        for name, heads in {"layers": of_layers(layers.order[:budget], groups),
                            "heads": order[:budget * groups]}.items():
            with only_heads(model, heads): values = held.measure(model)
            one[name] = {"kl": [round(x, 5) for x in values["kl"]],
                         "recall": round(statistics.fmean(values["recall"]), 4),
                         "layers with a cache": len({i for i, _ in heads})}
            print(budget, name, statistics.fmean(values["kl"]), one[name]["recall"], flush=True)
        found["budgets"].append(one)
        asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
