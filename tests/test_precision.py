"""Teachers in 16 bits: what trains is float32, what is saved has the teacher's format."""
import copy

import pytest
import torch
from families import FAMILIES, VARIANTS, teacher, tokens
from safetensors.torch import load_file

import flashmorph as fm
from flashmorph.model.branches import after_each
from flashmorph.model.morph import full_pass
from flashmorph.train.least_squares import (
    least_squares, run_traced, weight_of, with_one)

ROWS = [{"input_ids": torch.randint(5, 90, (24,), generator=torch.Generator().manual_seed(i))}
        for i in range(40)]
STEPS = {"steps": 20, "batch_size": 2, "lr": 1e-5, "progress": False}


def teachers():
    "The same weights in float32 and in bfloat16."
    half = teacher("llama").to(torch.bfloat16)
    return copy.deepcopy(half).float(), half


def trained(model, stage, by=None):
    "A hybrid of `model` after 20 steps (distilled `by` a teacher), its updates, and the losses."
    hybrid = fm.morph(model).commit([0])
    before = {name: p.detach().float().clone() for name, p in hybrid.named_parameters()}
    if stage == "distill": result = fm.distill(hybrid, by or model, ROWS, lr_end=None, **STEPS)
    else: result = fm.finetune(hybrid, ROWS, **STEPS)
    moved = {name: p.detach() - before[name] for name, p in hybrid.named_parameters()}
    return hybrid, moved, result.losses


@pytest.mark.parametrize("stage", ["distill", "finetune"])
def test_updates_are_those_of_float32(stage):
    full, half = teachers()
    _, exact, losses = trained(full, stage, by=half)
    hybrid, moved, other = trained(half, stage)
    for name, update in exact.items():
        assert update.abs().max() > 0
        assert (moved[name] - update).norm() <= 0.02 * update.norm(), name
    fell, others = losses[0] - losses[-1], other[0] - other[-1]
    assert abs(others - fell) <= 0.05 * abs(fell)
    assert all(p.dtype == torch.float32 for p in hybrid.parameters())
    assert half.dtype == torch.bfloat16


def test_a_rounded_teacher_teaches_nearly_the_same():
    full, half = teachers()
    _, exact, _ = trained(full, "distill")
    _, moved, _ = trained(half, "distill")
    for name, update in exact.items():
        assert abs(moved[name].norm() / update.norm() - 1) <= 0.02, name


def test_a_hybrid_is_saved_in_the_format_of_its_teacher(tmp_path):
    _, half = teachers()
    hybrid, _, _ = trained(half, "finetune")
    hybrid.save_pretrained(tmp_path / "half")
    saved = load_file(tmp_path / "half/model.safetensors")
    for name, p in hybrid.named_parameters():
        if name in saved: assert torch.equal(saved[name], p.detach().to(torch.bfloat16)), name
    assert hybrid.dtype == torch.float32
    loaded = fm.HybridForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16

    hybrid.save_pretrained(tmp_path / "full", dtype=torch.float32)
    saved = load_file(tmp_path / "full/model.safetensors")
    assert {x.dtype for x in saved.values()} == {torch.float32}
    # what is asked for is done, in either direction
    loaded.save_pretrained(tmp_path / "wide", dtype=torch.float32)
    assert fm.HybridForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32
    assert loaded.dtype == torch.bfloat16


@pytest.mark.parametrize("mixer", ["lightning", "gla", "gdn"])
def test_branches_of_a_16_bit_teacher_train_in_float32(mixer):
    _, half = teachers()
    model = fm.morph(half, mixer)
    ids = torch.stack([row["input_ids"] for row in ROWS[:4]])
    fm.align(model, ROWS, steps=3, batch_size=2, start_tokens=400, progress=False)
    assert all(p.dtype == torch.float32 for p in model.layers[0].linear.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.layers[0].full.parameters())
    # without autocast too: each gate, the losses, and the hybrid in the teacher's format
    for gate in (0.0, 0.5, 1.0):
        model.gates = gate
        assert model(ids).logits.dtype == torch.bfloat16
    assert model.alignment_losses(ids, relative=True).isfinite().all()
    hybrid = model.commit([0])
    kept = {p.dtype for name, p in hybrid.named_parameters() if name.split(".")[-1] != "A_log"
            and "dt_bias" not in name}
    assert hybrid.dtype == torch.bfloat16 and kept == {torch.bfloat16}
    # gates train on frozen float32 branches in a bfloat16 host
    books = [{**row, "answers": (torch.arange(24) > 20).long()} for row in ROWS]
    gates = fm.train_gates(model, books, steps=2, batch_size=2, progress=False)
    assert gates.gates.isfinite().all()


@pytest.mark.parametrize("precision", ["no", "bf16", None])
def test_branches_and_gates_train_in_any_precision(precision):
    _, half = teachers()
    model = fm.morph(half)
    more = {"steps": 2, "batch_size": 2, "precision": precision, "progress": False}
    books = [{**row, "answers": (torch.arange(24) > 20).long()} for row in ROWS]
    result = fm.align(model, ROWS, start_tokens=400, **more)
    gates = fm.train_gates(model, books, **more)
    assert all(torch.tensor(losses).isfinite().all() for losses in (result.losses, gates.losses))


def test_a_hybrid_frozen_in_part_needs_bf16():
    _, half = teachers()
    hybrid = fm.morph(half).commit([0])
    hybrid.get_input_embeddings().requires_grad_(False)
    with pytest.raises(ValueError, match='its products need "bf16"'):
        fm.finetune(hybrid, ROWS, **STEPS, precision="no")
    before = hybrid.get_input_embeddings().weight.clone()
    fm.finetune(hybrid, ROWS, **STEPS)
    assert torch.equal(hybrid.get_input_embeddings().weight, before)


def test_least_squares_without_autocast():
    _, half = teachers()
    model = fm.morph(half)
    for layer in model.layers: layer.linear.float()
    batches = ({"input_ids": torch.stack([a["input_ids"], b["input_ids"]])}
               for a, b in zip(ROWS[::2], ROWS[1::2], strict=True))
    found = least_squares(model, batches, tokens=960)
    assert all(error < 1 for error in found["layers"])


@pytest.mark.parametrize("family", sorted({*FAMILIES, *VARIANTS}))
def test_every_family_has_its_closed_form(family):
    "The projection, and the bias where there is one, are what `lstsq` finds in the same rows."
    model = fm.morph(teacher(family)).requires_grad_(False)
    batches = [{"input_ids": tokens(B=4, seed=seed)[0]} for seed in range(12)]
    rows: dict[str, list] = {"x": [], "y": []}

    def keep(layer, args, kwargs, output):
        traced = run_traced(layer.linear, args, kwargs)
        rows["x"].append(with_one(traced.inputs.flatten(0, 1), traced.projection).double())
        rows["y"].append(output[0].flatten(0, 1).double())
        rows["projection"] = traced.projection

    with torch.no_grad(), full_pass(model), after_each(model.layers[2:3], keep):
        for batch in batches: model.hidden(batch["input_ids"])
    before = model.alignment_losses(batches[0]["input_ids"], relative=True)
    start = weight_of(rows["projection"])
    found = least_squares(model, iter(batches), tokens=12 * 4 * 23)
    after = model.alignment_losses(batches[0]["input_ids"], relative=True)
    assert (after < before).all()
    # the ridge as rows below the data, near a multiple of the weights before
    x, y = torch.cat(rows["x"]), torch.cat(rows["y"])
    factor = torch.linalg.lstsq((x @ start.T).reshape(-1, 1), y.reshape(-1, 1)).solution.clamp(0)
    strength = (found["ridges"][2] * x.pow(2).sum(0).mean()).sqrt()
    below = strength * torch.eye(x.shape[1], dtype=x.dtype)
    full = torch.cat([x, below]), torch.cat([y, strength * factor * start.T])
    wanted = torch.linalg.lstsq(*full).solution
    projection, inputs = rows["projection"], torch.randn(5, x.shape[1])
    if projection.bias is not None: inputs[:, -1] = 1
    made = projection(inputs[:, :-1] if projection.bias is not None else inputs)
    torch.testing.assert_close(made, (inputs.double() @ wanted).float(), rtol=1e-3, atol=1e-3)


def test_a_module_without_a_last_projection_is_refused():
    model = fm.morph(teacher("llama"))
    attn = model.layers[1].linear.attn
    attn.o_proj = torch.nn.Sequential(attn.o_proj, torch.nn.Tanh())
    weights = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="layer 1: no linear layer"):
        least_squares(model, iter([{"input_ids": tokens()[0]}] * 4))
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
