"""Are heads a better unit than layers? `python tests/head_gates.py RUN` asks head by head.

A group of heads that share their keys and values is the least that can keep a cache of its own.
Groups are put in order twice. Each group of the run's teacher turns linear alone, and the answers
say how much they miss it. And each group gets a gate, all trained together as those of layers are.
Then sets of groups are compared with sets of layers of the same cache, on books that nobody has
read. An order or a set that the result already has is not measured again.
"""
import argparse
import contextlib
import itertools
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from zoo import RESULTS, packed

from flashmorph.choose.ablate import AnswerDivergence, remove_one
from flashmorph.choose.gates import AnswerObjective
from flashmorph.choose.path import BudgetDescent, first_gate
from flashmorph.choose.trajectory import load_gates
from flashmorph.data.mixture import batches
from flashmorph.folder import Run
from flashmorph.model.branches import MorphLayer
from flashmorph.model.morph import MorphableModel
from flashmorph.run.compare import HELD_OUT, branches_of, held_out_rows
from flashmorph.run.subsets import HeldOut

Head = tuple[int, int]                                  # a layer, and a group of its heads


def kept_part(layer: MorphLayer, module: torch.nn.Module, shares: Tensor) -> Any:
    """A hook before an output projection: each group of heads counts with its share.

    A pass of one branch alone, as the teacher's inside a training, stays as it is."""
    def scaled(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if layer.forced is not None: return inputs
        x = inputs[0]
        width = x.shape[-1] // len(shares)
        return (x * shares.to(x.dtype).repeat_interleave(width), *inputs[1:])
    return module.register_forward_pre_hook(scaled)


@contextlib.contextmanager
def all_heads(model: MorphableModel, shares: Tensor) -> Iterator[None]:
    "Inside, each group of heads has its share (L, groups) of full attention."
    before, hooks = [layer.forced for layer in model.layers], []
    gates = model.gates
    model.gates = 0.5
    try:
        for layer, full in zip(model.layers, shares):
            same = not full.requires_grad and full[0] in (0, 1) and bool((full == full[0]).all())
            layer.forced = float(full[0]) if same else None
            if same: continue
            # both branches count half, so twice a share is right
            hooks.append(kept_part(layer, layer.full.o_proj, 2 * full))
            hooks.append(kept_part(layer, layer.linear.attn.o_proj, 2 - 2 * full))
        yield
    finally:
        for hook in hooks: hook.remove()
        for layer, forced in zip(model.layers, before): layer.forced = forced
        model.gates = gates


def only_heads(model: MorphableModel, heads: Sequence[Head]) -> Any:
    "Inside, these groups of heads are full and all others linear."
    shares = torch.zeros(model.num_layers, model.config.num_key_value_heads)
    for head in heads: shares[head] = 1
    return all_heads(model, shares)


def trained(model: MorphableModel, books: Iterable[Any], steps: int) -> list[float]:
    "The mean gate of each group, in a training whose sum of gates falls from all to none."
    groups = model.config.num_key_value_heads
    model.requires_grad_(False)
    gates = [torch.nn.Parameter(torch.tensor(first_gate(steps)))
             for _ in range(model.num_layers * groups)]
    descent, objective = BudgetDescent(gates, steps), AnswerObjective(model)
    total = torch.zeros(len(gates))
    for batch in itertools.islice(batches(books, 2), steps):
        with all_heads(model, torch.stack(gates).view(-1, groups)):
            loss, _ = objective(batch)
            descent.zero_grad()
            loss.backward()
        total += torch.stack(gates).detach()
        descent.step()
        print(f"{loss.item():.4f}", flush=True)
    return [round(mean, 5) for mean in (total / steps).tolist()]


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


def orders_of(
    model: MorphableModel, run: Run, books: Iterable[Any], read: int, known: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    "The orders that are not known yet, by name."
    every = of_layers(range(model.num_layers), model.config.num_key_value_heads)
    some = list(itertools.islice(books, read))
    if "layers" not in known: yield "layers", remove_one(AnswerDivergence(model, some)).order
    if "heads" not in known:
        scores = missed(model, HeldOut(model, some), every)
        yield "heads", sorted(every, key=lambda head: (-scores[head], head))
    gates = load_gates(run.path("gates.json"))
    if "trained layers" not in known: yield "trained layers", gates.order()
    if "trained heads" not in known:
        means = dict(zip(every, trained(model, books, len(gates.trajectory) - 1)))
        yield "trained heads", sorted(every, key=lambda head: (-means[head], head))


def measure(held: HeldOut, heads: Sequence[Head]) -> dict[str, Any]:
    "The answer KL of each held-out book, the recall, and how many layers have a cache."
    with only_heads(held.model, heads): values = held.measure(held.model)
    print(statistics.fmean(values["kl"]), statistics.fmean(values["recall"]), flush=True)
    return {"kl": [round(x, 5) for x in values["kl"]],
            "recall": round(statistics.fmean(values["recall"]), 4),
            "layers with a cache": len({i for i, _ in heads})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--budgets", default="8,12,16,22")
    parser.add_argument("--read", type=int, default=8, help="books that one-out scores read")
    parser.add_argument("--count", type=int, default=64, help="held-out books")
    parser.add_argument("--json", type=Path, default=RESULTS / "head_gates.json")
    asked = parser.parse_args()
    run = Run(asked.run)
    materials, model = branches_of(run)
    groups = model.config.num_key_value_heads
    rows, _ = held_out_rows(materials.tokenizer, materials.recipe.evaluate, HELD_OUT)
    held = HeldOut(model, rows, asked.count, batch_size=4)
    found: dict[str, Any] = {
        "layers": model.num_layers, "groups of heads": groups, "books read": asked.read,
        "held-out books": asked.count, "orders": {}, "sets": []}
    if asked.json.exists(): found |= json.loads(asked.json.read_text(encoding="utf-8"))
    books = materials.books(materials.recipe.seed)
    for name, order in orders_of(model, run, books, asked.read, found["orders"]):
        found["orders"][name] = order
        asked.json.write_text(packed(found), encoding="utf-8")
    measured = {(one["order"], one["budget"]) for one in found["sets"]}
    for budget, (name, order) in itertools.product(
            map(int, asked.budgets.split(",")), found["orders"].items()):
        if (name, budget) in measured: continue
        heads = [tuple(head) for head in order[:budget * groups]] if "heads" in name else \
            of_layers(order[:budget], groups)
        print(budget, name, end=" ", flush=True)
        found["sets"].append({"order": name, "budget": budget, **measure(held, heads)})
        asked.json.write_text(packed(found), encoding="utf-8")


if __name__ == "__main__": main()
