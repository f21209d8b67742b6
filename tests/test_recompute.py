"Layers that run again in the backward pass: less is kept, and nothing else changes."
import contextlib

import pytest
import torch
from families import FAMILIES, VARIANTS, teacher, tokens
from transformers.modeling_layers import GradientCheckpointingLayer

import flashmorph as fm
from flashmorph.model.recompute import recomputing

ROWS = [{"input_ids": torch.randint(5, 90, (24,), generator=torch.Generator().manual_seed(i)),
         "answers": (torch.arange(24) > 20).long()} for i in range(12)]
STEPS = {"steps": 3, "batch_size": 2, "progress": False}


def kept(model, ids):
    "Bytes kept between the passes, the weights apart, and the gradients of all that trains."
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights: sizes[storage.data_ptr()] = storage.nbytes()
        return x

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return sum(sizes.values()), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", sorted({*FAMILIES, *VARIANTS}))
def test_every_family_keeps_less(family):
    hybrid = fm.morph(teacher(family)).commit([0, 2]).requires_grad_(True)
    ids = tokens(B=4)[0]
    plain, expected = kept(hybrid, ids)
    with recomputing(hybrid): less, gradients = kept(hybrid, ids)
    assert less < 0.6 * plain
    assert not hybrid.training
    for name, gradient in expected.items():
        # the parts of a tied weight's gradient may be added in another order
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


class Watch(fm.Callback):
    "Notes after each step which decoder layers of `model` run again."
    def __init__(self, model):
        self.layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        self.seen = []

    def step(self, event):
        self.seen += [layer.gradient_checkpointing and layer.training for layer in self.layers]


def trained(stage, recompute):
    "The losses of a stage, and the weights that it leaves."
    model = fm.morph(teacher("llama"))
    if stage != "gates": model = model.commit([1])
    watch = Watch(model)
    more = STEPS | {"recompute": recompute, "callbacks": [watch]}
    if stage == "gates":
        run = fm.train_gates(model, ROWS, **more)
        assert watch.seen == [recompute] * 3 * 4
        return run.losses, run.trajectory
    if stage == "distill": result = fm.distill(model, teacher("llama"), ROWS, **more)
    else: result = fm.finetune(model, ROWS, **more)
    assert watch.seen == [recompute] * 3 * 4
    return result.losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("stage", ["gates", "distill", "finetune"])
def test_results_are_the_same(stage):
    losses, left = trained(stage, recompute=False)
    again, other = trained(stage, recompute=True)
    assert again == losses and torch.equal(left, other)


def test_a_run_may_turn_it_on_midway(tmp_path):
    "For a stage that ran out of memory: its checkpoints are good."
    hybrid = fm.morph(teacher("llama")).commit([1])

    class Stop(fm.Callback):
        def step(self, event):
            if event["step"] == 2: raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fm.finetune(hybrid, ROWS, **STEPS, save_every=1, run=tmp_path, callbacks=[Stop()])
    hybrid = fm.morph(teacher("llama")).commit([1])
    result = fm.finetune(hybrid, ROWS, **STEPS, run=tmp_path, resume=True, recompute=True)
    assert result.losses == trained("finetune", recompute=False)[0]


def test_where_it_cannot_work():
    with pytest.raises(ValueError, match=r"align\.recompute: the gradients of stage 1 stay"):
        fm.align(fm.morph(teacher("llama")), ROWS, recompute=True)
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no decoder layers"), recomputing(plain): pass
