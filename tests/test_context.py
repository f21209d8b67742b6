"""Context parallelism on 2 and 4 processes (gloo, CPU): equal to whole rows in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from small import Stop
from test_shard import books, far, processes, rank, teacher, weights
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


HYBRIDS = (
    ("lightning", "qwen3", [1, 2], {"logit_scale": 50.0}),
    ("lightning(own_decays=True, conv=2)", "gemma3_text", [], {}),
    ("gla(rope=False)", "gemma3_text", [0, 1, 3], {}),
    ("gla(conv=4)", "qwen3", [3], {"full_rope": False}),
    ("gdn(conv=4)", "qwen3", [0, 2], {}),
    ("gdn", "gemma3_text", [2], {}),
)


def check_hybrids():
    "Logits and gradients of pieces, against those of whole rows, for mixers and families."
    dist.init_process_group("gloo")
    context = Context()
    for mixer, family, full, options in HYBRIDS[:: context.size // 2]:
        model = hybrid_of(mixer, family, full, **options)
        model.gradient_checkpointing_enable()
        # checkpoints work in training mode, where logits do not grow with the position
        for length, padded in ((22, True), (24, False)):
            model.train(padded)
            rows = rows_of(length, padded)
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
        # outside, rows are whole again
        assert torch.equal(output(model, rows), expect)


@pytest.mark.parametrize("world", [2, 4])
def test_hybrids_on_pieces(world):
    processes(world, check_hybrids)




STEPS = 10
COMMON = {"progress": False, "steps": STEPS, "batch_size": 4}


def stages(cut=1, all_kinds=True):
    "Losses and weights of stages whose rows are cut into pieces, by name."
    rows, found = books(4 * STEPS), {}
    # 24 tokens in 4 pieces of 6; the last rows have a piece that is padding alone
    for row in rows[-4:]: row["attention_mask"][11:] = 0
    common = {**COMMON, "context_parallel": cut}
    for mixer, relative in (("gdn(conv=4)", True), ("lightning", False))[:2 if all_kinds else 1]:
        model = fm.morph(teacher(), mixer)
        start = "least-squares" if relative else "copy"
        result = fm.align(model, rows, start=start, start_tokens=600, relative=relative,
                          optimizer="adamw", **common)
        found[f"align, {mixer}"] = (result.losses, weights(model))
    hybrid = fm.morph(teacher(), "gla(conv=2)").commit([1])
    result = fm.distill(hybrid, teacher(), rows, recompute=True, **common)
    found["distill"] = (result.losses, weights(hybrid))
    if all_kinds:
        # 23 tokens, which two processes do not divide
        short = [{name: x[:23] for name, x in row.items()} for row in rows]
        hybrid = fm.morph(teacher(), "gdn").commit([0], logit_scale=100.0)
        result = fm.finetune(hybrid, short, answer_weight=0.5, accumulate=2, **common)
        found["finetune"] = (result.losses, weights(hybrid))
    return found


def write_stages(file, cut, all_kinds):
    found = stages(cut, all_kinds)
    if rank() == 0: torch.save(found, file)


@pytest.fixture(scope="module")
def alone(): return stages()


# two pieces; two groups of two pieces; four pieces
@pytest.mark.parametrize("world, cut", [(2, 2), (4, 2), (4, 4)])
def test_stages_equal_those_on_whole_rows(world, cut, alone, tmp_path):
    processes(world, write_stages, tmp_path / "found", cut, world == 2)
    found = torch.load(tmp_path / "found")
    assert len(found) == (4 if world == 2 else 2)
    for name, (losses, end) in found.items():
        expect, expect_end = alone[name]
        worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expect, strict=True))
        assert len(losses) >= STEPS and worst < 1e-5, (name, worst)
        assert far(end, expect_end) < 1e-5, name


def half_a_stage(folder, cut, stop):
    "Stage 3 of four steps, in pieces, which stops after two or goes on from there."
    hybrid = fm.morph(teacher(), "gdn(conv=4)").commit([1])
    own = {"steps": 4, "context_parallel": cut, "callbacks": [Stop("distill", 2)] if stop else []}
    more = {"run": folder, "resume": True} if folder else {}
    result = fm.distill(hybrid, teacher(), books(16), **COMMON | own, save_every=1, **more)
    return result.losses, weights(hybrid)


def stop_on_pieces(folder, cut):
    with pytest.raises(KeyboardInterrupt): half_a_stage(folder, cut, stop=True)


def test_a_stage_on_pieces_goes_on_with_whole_rows(tmp_path):
    processes(2, stop_on_pieces, tmp_path / "run", 2)
    losses, end = half_a_stage(tmp_path / "run", 1, stop=False)
    expect, expect_end = half_a_stage(None, 1, stop=False)
    assert far(losses, expect) < 1e-5 and far(end, expect_end) < 1e-5


def refused(message, **settings):
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    with pytest.raises(ValueError, match=message):
        fm.distill(hybrid, teacher(), **COMMON | {"data": books(8)} | settings)


def refuse():
    "What cannot be cut, on two processes that both have to notice."
    refused("2 processes cannot form groups of 3", context_parallel=3)
    packed = [{**row, "position_ids": torch.arange(24) % 12} for row in books(8)]
    for row in packed: del row["attention_mask"]
    refused("packed rows cannot be cut", context_parallel=2, data=packed)


def test_what_cannot_be_cut_is_refused():
    processes(2, refuse)
    refused("1 processes cannot form groups of 2", context_parallel=2)
