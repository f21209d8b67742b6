"What makes decoding fast changes no number: slots that grow, and the path of a single token."
import copy
import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from flashmorph.model.cache import Growing, GrowingLayer, ahead


def tokens(slot: DynamicLayer, count: int, draw: torch.Generator) -> tuple:
    rows = slot.keys.shape[0] if slot.is_initialized else 2
    return tuple(torch.randn(rows, 2, count, size, generator=draw) for size in (4, 3))


def operations(seed: int) -> list[tuple[str, int]]:
    "What a generation may do with a slot, in any order."
    choose = random.Random(seed)
    names = ["add"] * 8 + ["many", "crop", "copy", "select", "repeat", "reorder", "grad", "infer"]
    return [(choose.choice(names), choose.randrange(2**31)) for _ in range(60)]


def step(slot: DynamicLayer, name: str, seed: int) -> DynamicLayer:
    "The slot after one operation."
    draw = torch.Generator().manual_seed(seed)
    batch = slot.keys.shape[0] if slot.is_initialized else 2
    if name in ("add", "many", "grad", "infer"):
        new = tokens(slot, 1 if name != "many" else seed % 90 + 1, draw)
        with torch.inference_mode(name == "infer"), torch.set_grad_enabled(name == "grad"):
            slot.update(*new)
    elif name == "crop": slot.crop(-min(slot.get_seq_length(), seed % 3))
    elif name == "copy": slot = copy.deepcopy(slot)
    elif name == "select": slot.batch_select_indices(torch.tensor([seed % batch, 0]))
    elif name == "repeat" and batch < 8: slot.batch_repeat_interleave(2)
    elif name == "reorder": slot.reorder_cache(torch.randint(batch, (batch,), generator=draw))
    return slot


@pytest.mark.parametrize("seed", range(20))
def test_a_growing_slot_holds_what_transformers_holds(seed):
    ours, theirs = GrowingLayer(), DynamicLayer()
    handed_out = []
    with torch.no_grad():
        for name, number in operations(seed):
            ours, theirs = step(ours, name, number), step(theirs, name, number)
            assert ours.get_seq_length() == theirs.get_seq_length()
            if not theirs.get_seq_length(): continue
            assert torch.equal(ours.keys, theirs.keys), name
            assert torch.equal(ours.values, theirs.values), name
            handed_out.append((ours.keys, theirs.keys))
    # what was handed out has not changed since
    assert all(torch.equal(a, b) for a, b in handed_out)


def test_two_continuations_of_one_slot_are_apart():
    slot = GrowingLayer()
    one, two, three = (torch.full((1, 1, 1, 2), float(i)) for i in (1, 2, 3))
    with torch.no_grad():
        slot.update(one, one)
        other = copy.copy(slot)                 # shares the memory
        slot.update(two, two)
        other.update(three, three)
    assert slot.keys[0, 0, :, 0].tolist() == [1, 2]
    assert other.keys[0, 0, :, 0].tolist() == [1, 3]


def test_gradients_flow_through_a_growing_slot():
    slot = GrowingLayer()
    leaf = torch.ones(1, 1, 2, 2, requires_grad=True)
    slot.update(leaf, leaf)
    kept, _ = slot.update(2 * leaf, leaf)
    square = (kept ** 2).sum()
    with torch.no_grad(): slot.update(leaf, leaf)
    square.backward()
    assert leaf.grad.flatten().tolist() == [10.0] * 4


def test_memory_is_seldom_taken():
    rows, held, taken = Growing(), None, 0
    new = torch.zeros(1, 1, 1, 1)
    for _ in range(4096):
        before = rows.memory
        held = rows.add(held, new)
        taken += rows.memory is not before
    assert taken <= 30                                  # 65, 138, ... rows: 9 / 8 of the last
    assert rows.memory.shape[-2] <= 4096 + ahead(4096)
    assert held.shape[-2] == 4096


def test_formats_are_joined_as_by_cat():
    rows = Growing()
    half, single = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16), torch.full((1, 1, 1, 2), 1 / 3)
    held = rows.add(None, half)
    joined = rows.add(held, single)
    assert joined.dtype == torch.float32
    assert torch.equal(joined, torch.cat([half, single], -2))
