"""Context parallelism on 2 and 4 processes (gloo, CPU): equal to whole rows in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_shard import far, processes
from transformers import AutoConfig, AutoModelForCausalLM

import flashmorph as fm
from flashmorph.model.context import context_parallel, piece_of
from flashmorph.ops import gdn, gla, lightning
from flashmorph.ops.context import Context, in_context

VOCAB = 61


def inputs(op, T):
    "A first state and the tensors of `op`, on all processes alike."
    random = torch.Generator().manual_seed(T)

    def rand(*shape): return torch.randn(shape, generator=random, dtype=torch.float64)
    decay = -0.05 * rand(2, T, 3, *(5,) * (op is gla)).abs()
    tensors = [rand(2, T, 3, 5), F.normalize(rand(2, T, 3, 5), dim=-1), rand(2, T, 3, 7), decay]
    if op is gdn: tensors.append(rand(2, T, 3).sigmoid())
    return [x.requires_grad_() for x in (rand(2, 3, 5, 7), *tensors)]


def joined(x, lengths):
    "Pieces of unequal lengths put together, without gradients."
    room = max(lengths)
    mine = x.new_zeros(len(x), room, *x.shape[2:])
    mine[:, :x.shape[1]] = x.detach()
    every = [torch.empty_like(mine) for _ in lengths]
    dist.all_gather(every, mine)
    return torch.cat([one[:, :n] for one, n in zip(every, lengths)], 1)


def summed(x):
    dist.all_reduce(x)
    return x


def check_op(op, lengths):
    "Outputs, last state and all gradients of pieces, against those of whole rows."
    context = Context()
    state, *tensors = given = inputs(op, sum(lengths))
    out, end = op(*tensors, state=state)
    w = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    wanted = torch.autograd.grad((out * w).sum() + end.square().sum(), given)
    begin = sum(lengths[:context.rank])
    mine = slice(begin, begin + lengths[context.rank])
    got, got_end = in_context(op, *(x[:, mine] for x in tensors), context=context, state=state)
    last = context.rank == context.size - 1
    loss = (got * w[:, mine]).sum() + (got_end.square().sum() if last else 0)
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(given, grads)]
    assert float((joined(got, lengths) - out).abs().max()) < 1e-10
    if last: assert float((got_end - end).abs().max()) < 1e-10
    for g, expect in zip(grads, wanted): assert float((summed(g) - expect).abs().max()) < 1e-10


def check_ops():
    dist.init_process_group("gloo")
    lengths = [5, 64, 1, 71][:dist.get_world_size()]
    for op in (lightning, gla, gdn): check_op(op, lengths)


@pytest.mark.parametrize("world", [2, 4])
def test_ops_on_pieces_of_unequal_lengths(world):
    processes(world, check_ops)


FAMILIES = {
    "qwen3": {"attn_implementation": "eager"},
    # two of four layers look back 6 tokens
    "gemma3_text": {"sliding_window": 6,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def hybrid_of(mixer, family, full, **options):
    "A hybrid with random weights everywhere."
    torch.manual_seed(0)
    extra = dict(FAMILIES[family])
    named = {name: extra.pop(name) for name in ("attn_implementation",) if name in extra}
    config = AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2, **extra)
    teacher = AutoModelForCausalLM.from_config(config, **named).eval()
    model = fm.morph(teacher, mixer).commit(full, **options)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model


def rows_of(length, padded):
    random = torch.Generator().manual_seed(2)
    rows = {"input_ids": torch.randint(0, VOCAB, (3, length), generator=random)}
    if not padded: return rows
    mask = torch.ones(3, length, dtype=torch.long)
    mask[0, :9] = mask[1, 11:] = mask[2, 7:12] = 0
    return rows | {"attention_mask": mask}


def output(model, batch):
    "The logits, zeros at padding."
    logits = model(**batch).logits
    mask = batch.get("attention_mask")
    return logits if mask is None else logits * mask[..., None]


def gradients(model, loss):
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)]


def check_hybrids():
    "Logits and gradients of pieces, against those of whole rows, for mixers and families."
    dist.init_process_group("gloo")
    context = Context()
    for mixer, family, full, options in (
            ("lightning", "qwen3", [1, 2], {"logit_scale": 50.0}),
            ("lightning(own_decays=True, conv=2)", "gemma3_text", [], {}),
            ("gla(rope=False)", "gemma3_text", [0, 1, 3], {}),
            ("gla(conv=4)", "qwen3", [3], {"full_rope": False}),
            ("gdn(conv=4)", "qwen3", [0, 2], {}), ("gdn", "gemma3_text", [2], {})):
        model = hybrid_of(mixer, family, full, **options).train()
        for length, padded, again in ((22, True, False), (24, False, True)):
            rows = rows_of(length, padded)
            if again: model.gradient_checkpointing_enable()
            else: model.gradient_checkpointing_disable()
            expect = output(model, rows)
            wanted = gradients(model, expect.sin().sum())
            with context_parallel(context, model):
                mine = piece_of(rows, context)
                got = output(model, mine)
                grads = gradients(model, got.sin().sum())
            n = mine["input_ids"].shape[1]
            whole = joined(got, [n] * context.size)[:, :length]
            assert far(whole, expect.detach()) < 1e-5, mixer
            grads = torch.cat([summed(g).flatten() for g in grads])
            assert far(grads, torch.cat([g.flatten() for g in wanted])) < 1e-5, mixer
        model.gradient_checkpointing_disable()
        # outside, rows are whole again
        assert torch.equal(output(model, rows), expect)


@pytest.mark.parametrize("world", [2, 4])
def test_hybrids_on_pieces(world):
    processes(world, check_hybrids)


