"""Documents packed in a row: what each yields by itself, in every op, layer, branch and stage."""

import pytest
import torch
from test_hybrid import LENGTHS, documents, packed_rows, shake
from test_hybrid import teacher as teacher_of

from flashmorph.choose.gates import AnswerObjective, PriceObjective
from flashmorph.model.mixers import Lightning, register_mixer
from flashmorph.model.morph import morph
from flashmorph.train.align import AlignObjective
from flashmorph.train.distill import DistillObjective, NextTokenObjective

MIXERS = [f"{name}{more}" for name in ("lightning", "gla", "gdn") for more in ("", "(conv=4)")]
MIXERS.append("lightning(own_decays=True)")
TOLERANCE = 1e-5


def far(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.fixture(autouse=True)
def forget_compiled():
    torch._dynamo.reset()


def small_hybrid(mixer):
    "A linear layer, then a full one."
    model = morph(teacher_of("llama", num_hidden_layers=2), mixer)
    for layer in model.layers:
        shake(layer.linear, 0.1)
    return shake_conv(model.commit([1]))


def shake_conv(model):
    "Convolutions that are no identities."
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "conv.weight" in name:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return model


def results(model, outputs):
    "Logits `(N, V)`, and the gradients of all parameters."
    model.zero_grad()
    logits = torch.cat([x.flatten(0, 1) for x in outputs])
    logits.pow(2).mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_equals_separate(mixer):
    """Logits and the gradient of every parameter, plain and compiled.

    In float64: in float32 separate documents alone, summed in another order, are up to 3e-5 off."""
    torch.manual_seed(0)
    model = small_hybrid(mixer).double().train()
    ids, positions = packed_rows()
    alone = results(model, [model(one, use_cache=False).logits for one in documents(ids)])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    forms = {"plain": model, "compiled": compiled}
    for form, run in forms.items():
        packed = results(model, [run(ids, position_ids=positions).logits])
        assert packed.keys() == alone.keys() and len(alone) > 10
        errors = {name: far(packed[name], x) for name, x in alone.items()}
        print(f"{mixer:28} {form:9} logits {errors['logits']:.0e} all {max(errors.values()):.0e}")
        assert max(errors.values()) < TOLERANCE
    # a model that runs on would be far off
    assert far(model(ids).logits.flatten(0, 1), alone["logits"]) > 1e-2


def test_compiled_rows_that_cannot_be_separated_are_refused():
    "With a cache asked for, and with a mixer that does not promise to reset."

    @register_mixer("never_resets")
    class NeverResets(Lightning):
        resets = False

    ids, positions = packed_rows()
    for mixer, more in (("lightning", dict(use_cache=True)), ("never_resets", {})):
        model = small_hybrid(mixer)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad(), pytest.raises(ValueError, match="packed rows"):
            compiled(ids, position_ids=positions, **more)


@pytest.mark.parametrize("compiled", [False, True])
def test_positions_that_start_again_beside_a_mask_are_refused(compiled):
    "The full layers would not separate there; restarts at padding are none."
    model = small_hybrid("lightning")
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    ids, positions = packed_rows()
    real = torch.ones_like(ids)
    with torch.no_grad():
        with pytest.raises(ValueError, match="packed rows"):
            run(ids, attention_mask=real, position_ids=positions, use_cache=False)
        real[:, :12] = 0
        run(ids[:2], attention_mask=real[:2], position_ids=positions[:1].expand(2, -1) * 0
            + (real[:2].cumsum(-1) - 1).clamp(min=0), use_cache=False)


def ragged(ids):
    "The documents as rows padded on the right: a batch of documents alone."
    rows = [one[0] for one in documents(ids)]
    width = max(map(len, rows))
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": tokens, "attention_mask": (torch.arange(width) < lengths[:, None]).long()}


def answers_of(batch):
    "Some tokens to ask for, the same ones in both batches; none is the first of a document."
    ids = batch["input_ids"]
    first = torch.zeros_like(ids, dtype=torch.bool)
    first[:, 0] = True
    if "position_ids" in batch:
        first |= batch["position_ids"] == 0
    real = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return ((ids % 3 == 0) & ~first & real).long()


def objectives():
    "Each stage's loss."
    model = shake_conv(morph(teacher_of("llama", num_hidden_layers=2), "gdn(conv=4)")).double()
    model.gates = 0.5
    yield AlignObjective(model)
    for layer in model.layers:
        layer.alpha.requires_grad_(True)
    yield PriceObjective(model, lam=0.0)
    answers = AnswerObjective(model)
    model.gates = 0.5
    yield answers
    hybrid = small_hybrid("gdn(conv=4)").double().train()
    yield DistillObjective(hybrid, teacher_of("llama", num_hidden_layers=2).double())
    yield NextTokenObjective(hybrid, answer_weight=2.0)


def test_stages_on_packed_rows():
    "Losses and gradients are those of the same documents in rows of their own."
    ids, positions = packed_rows()
    packed, alone = {"input_ids": ids, "position_ids": positions}, ragged(ids)
    assert int(alone["attention_mask"].sum()) == ids.numel() == sum(map(sum, LENGTHS))
    for batch in (packed, alone):
        batch["answers"] = answers_of(batch)
    for objective in objectives():
        found = []
        for batch in (packed, alone):
            objective.check(batch)
            trained = objective.trainable()
            loss, _ = objective(batch)
            grads = torch.autograd.grad(loss, trained.values(), allow_unused=True)
            found.append((loss.detach(), *(g for g in grads if g is not None)))
            assert all(x.abs().max() > 0 for x in found[-1])
        assert len(found[0]) == len(found[1]) > 1
        worst = max(far(a, b) for a, b in zip(*found))
        print(f"{type(objective).__name__}: {worst:.0e}")
        assert worst < TOLERANCE
        counts = [objective.counts(batch) for batch in (packed, alone)]
        assert counts[0] == counts[1]
