"Every form of the three ops against the recurrence in float64, and against implementations that are not ours."
import warnings

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import flashmorph as fm
from flashmorph.model.mixers import lightning_log_decay
from flashmorph.ops import chunked, decays, dispatch, fast, reference

LENGTHS = (1, 2, 63, 64, 65, 257, 1000)
B, H, DK, DV = 2, 3, 8, 12
OPS = ("lightning", "gla", "gdn")
DECAYS = {                                                    # of shape (B, T, H), or for gla (B, T, H, DK)
    "none": lambda *shape: torch.zeros(shape),
    "random": lambda *shape: -torch.rand(shape),
    "steep": lambda *shape: -3 * torch.rand(shape),
    "strong": lambda *shape: torch.full(shape, -20.),
    "padding": lambda *shape: -torch.rand(shape) * (torch.rand(B, shape[1], *(1,) * (len(shape) - 2)) < 0.7),
    "extreme": lambda *shape: torch.where(torch.rand(shape) < 0.05, -1000., -0.01),
    "mixed": lambda *shape: -torch.rand(shape) * torch.tensor([0.1, 20., 0.1, 2.])[torch.arange(shape[1]) // 64 % 4].view(-1, *(1,) * (len(shape) - 2)),
}
PER_HEAD = {"head none": lambda: torch.zeros(H), "head random": lambda: -torch.rand(H), "head ladder": lambda: lightning_log_decay(H),
            "head strong": lambda: torch.full((H,), -20.)}


def inputs(op, T, decay="random", with_state=True):
    "q, k, v, log_decay, then beta for gdn, then the state or None."
    torch.manual_seed(T)
    q, k, v = torch.randn(B, T, H, DK), torch.randn(B, T, H, DK), torch.randn(B, T, H, DV)
    g = PER_HEAD[decay]() if decay in PER_HEAD else DECAYS[decay](B, T, H, *((DK,) if op == "gla" else ()))
    rest = [torch.rand(B, T, H)] if op == "gdn" else []
    return [q, F.normalize(k, dim=-1) if op == "gdn" else k, v, g, *rest, torch.randn(B, H, DK, DV) if with_state else None]


def results(form, *x, fixed=()):
    "Output, final state, and gradients of a random function of both with respect to all inputs but those at `fixed`."
    leaves = [t if t is None or i in fixed else t.detach().requires_grad_() for i, t in enumerate(x)]
    o, S = form(*leaves[:-1], state=leaves[-1])
    gen = torch.Generator().manual_seed(0)
    loss = sum((t * torch.randn(t.shape, generator=gen).to(t)).sum() for t in (o, S))
    wanted = [t for i, t in enumerate(leaves) if t is not None and i not in fixed]
    return [o, S, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]          # a first step has no use for the decay


def truth(op, *x, **kw): return results(getattr(reference, op), *(None if t is None else t.double() for t in x), **kw)
def error(a, b): return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


CASES = [(op, decay) for op in OPS for decay in (*DECAYS, *(PER_HEAD if op == "lightning" else ()))]

@pytest.mark.parametrize("op,decay", CASES)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_the_recurrence(op, decay, T):
    """Values and all gradients. Decays per head are constants here: the gradient of one is a sum of random signs over all tokens, ill conditioned;
    that of decays per token is compared, and a float64 comparison of the sum is below."""
    fixed = (3,) if decay in PER_HEAD else ()
    for with_state in (False, True):
        x = inputs(op, T, decay, with_state)
        got = results(getattr(fast, op), *x, fixed=fixed)
        assert all(t.isfinite().all() for t in got)
        worst = max(error(a, b) for a, b in zip(got, truth(op, *x, fixed=fixed), strict=True))
        assert worst <= 1e-5, worst


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("decay", DECAYS)
def test_one_row_one_head(op, decay):
    "Sizes of 1 make views contiguous that otherwise are not, and a copy that is none is overwritten."
    for T in (1, 2, 3, 16, 64, 65):
        *x, S = inputs(op, T, decay)
        x = [t[:1, :, :1].double() for t in x] + [S[:1, :1].double()]
        assert max(error(a, b) for a, b in zip(results(getattr(fast, op), *x), truth(op, *x), strict=True)) <= 1e-10


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("T", [1, 65, 1000])
def test_bfloat16_inputs(op, T):
    "Against the float64 recurrence on the same rounded inputs: what is lost is the rounding of outputs and gradients."
    q, k, v, *rest = inputs(op, T)
    x = [t.bfloat16() for t in (q, k, v)] + rest
    got = results(getattr(fast, op), *x)
    assert [t.dtype for t in got[:2]] == [torch.bfloat16, torch.float32]
    assert max(error(a, b) for a, b in zip(got, truth(op, *x), strict=True)) <= 2e-2


@pytest.mark.parametrize("op", OPS)
def test_float32_recurrence_and_step(op):
    for decay in DECAYS:
        for T, form in ((65, getattr(reference, op)), (1, getattr(reference, op)), (1, getattr(dispatch, f"{op}_step"))):
            for with_state in (False, True):
                x = inputs(op, T, decay, with_state)
                assert max(error(a, b) for a, b in zip(results(form, *x), truth(op, *x), strict=True)) <= 1e-5


def test_gradient_of_a_decay_per_head():
    q, k, v, _, S = (x.double() for x in inputs("lightning", 70))
    g = (-torch.rand(H, dtype=torch.float64)).requires_grad_()
    a, b = (torch.autograd.grad(form(q, k, v, g, state=S)[0].sin().sum(), g)[0] for form in (fast.lightning, reference.lightning))
    assert error(a, b) < 1e-10


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    x = [t[:1, :5].double() if i < len(OPS) + 1 or op == "gdn" and i == 4 else t[:1].double() for i, t in enumerate(inputs(op, 5))]
    leaves = [t.requires_grad_() for t in x]
    assert torch.autograd.gradcheck(lambda *x: getattr(fast, op)(*x[:-1], state=x[-1]), leaves)


@pytest.mark.parametrize("op", OPS)
def test_equal_keys_do_not_hurt_the_inverse(op):
    "All keys the same and written with full strength: powers of the triangular matrix would overflow here, substitution does not."
    q, k, v, g, *rest, S = inputs(op, 257, "none")
    rest = [torch.ones_like(t) for t in rest]
    x = [q, k[:, :1].expand(k.shape).contiguous(), v, g, *rest, S]
    assert max(error(a, b) for a, b in zip(results(getattr(fast, op), *x), truth(op, *x), strict=True)) <= 1e-5


@pytest.mark.parametrize("op", OPS)
def test_state_is_carried(op):
    *x, S = inputs(op, 300)
    whole, end = getattr(dispatch, op)(*x, state=S)
    cuts, parts = sorted({0, 300, *torch.randint(1, 300, (6,)).tolist()}), []
    for a, b in zip(cuts, cuts[1:]):
        o, S = getattr(dispatch, op)(*(t[:, a:b] for t in x), state=S)
        parts.append(o)
    assert error(torch.cat(parts, 1), whole.double()) < 1e-5 and error(S, end.double()) < 1e-5


@pytest.mark.parametrize("op", OPS)
def test_segments_change_nothing(op, monkeypatch):
    x = inputs(op, 257)
    whole = results(getattr(fast, op), *x)
    monkeypatch.setattr(fast, "SEGMENT", 1)
    for a, b in zip(results(getattr(fast, op), *x), whole): assert error(a, b.double()) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_recording_changes_nothing(op, monkeypatch):
    *x, S = inputs(op, 257)
    monkeypatch.setattr(fast, "SEGMENT", 1 << 12)
    recorded = getattr(fast, op)(*(t.requires_grad_() for t in x), state=S)
    with torch.no_grad(): free = getattr(fast, op)(*x, state=S)
    assert all(a.requires_grad and not b.requires_grad and torch.equal(a, b) for a, b in zip(recorded, free, strict=True))


@pytest.mark.parametrize("op,decay", CASES)
def test_memory_is_used_again_only_when_it_is_free(op, decay, monkeypatch):
    """The same results where each request gets memory of its own, and where old contents become nan.

    Values are as wide as keys, to share as much memory as possible."""
    q, k, v, *rest, S = inputs(op, 257, decay)
    x = [q, k, v[..., :DK], *rest, S[..., :DK]]
    monkeypatch.setattr(fast, "SEGMENT", 1 << 12)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "Workspace", decays.Memory)
        patch.setattr(fast, "GLA", fast.GLA._replace(forward=chunked.gla_forward))
        expected = results(getattr(fast, op), *x)
    assert all(torch.equal(a, b) for a, b in zip(results(getattr(fast, op), *x), expected, strict=True))

    empty, once = fast.Workspace.empty, fast.Workspace.once
    def poisoned(self, name, *shape): return empty(self, name, *shape).fill_(torch.nan)
    def rebuilt(self, make, *sizes):                    # its buffers are asked for, and poisoned, again
        return make(self, *sizes) if make is fast.WholeChunks else once(self, make, *sizes)
    monkeypatch.setattr(fast.Workspace, "empty", poisoned)
    monkeypatch.setattr(fast.Workspace, "once", rebuilt)
    assert all(torch.equal(a, b) for a, b in zip(results(getattr(fast, op), *x), expected, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("module", [reference, fast])
def test_dtypes_autocast_strides(op, module):
    form, (q, k, v, *rest, S) = getattr(module, op), inputs(op, 70)
    expected = form(q, k, v, *rest, state=S, scale=0.7)
    with torch.autocast("cpu", torch.bfloat16): under = form(q, k, v, *rest, state=S, scale=0.7)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for a, b, c in zip(expected, under, form(*strided, *rest, state=S, scale=0.7)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(expected[0], form(0.7 * q, k, v, *rest, state=S, scale=1.)[0])
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        o, S2 = form(q.to(dtype), k.to(dtype), v.to(dtype), *rest)
        assert (o.dtype, S2.dtype) == (dtype, state_dtype)


@pytest.mark.parametrize("op", OPS)
def test_memory_is_linear(op):
    def kept(T):
        x = [t.requires_grad_() for t in inputs(op, T, with_state=False)[:-1]]
        seen = {}
        def note(x): seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): out = getattr(fast, op)(*x)
        return sum(seen.values()), out, sum(t.nbytes for t in x)
    (small, *_), (large, _, given) = kept(1024), kept(4096)
    assert 3.5 < large / small < 4.2 and large < 1.1 * given


@pytest.mark.parametrize("op", OPS)
def test_wishes(op):
    (*long, _), (*short, _) = inputs(op, 9), inputs(op, 1)
    call = getattr(dispatch, op)
    assert "'torch'" in dispatch.report(op, *long) and "'step'" in dispatch.report(op, *short)
    for wish in ("step", "troch", "cuda", "triton", "fla", 3):
        with pytest.raises(ValueError, match="available here: torch, reference"): call(*long, impl=wish)
    with pytest.raises(ValueError, match="did you mean 'torch'"): call(*long, impl="troch")
    with pytest.raises(ValueError, match="one token"): getattr(dispatch, f"{op}_step")(*long)


@pytest.mark.parametrize("block,T", [(8, 37), (16, 64), (256, 40)])
def test_minimax_is_an_independent_witness(block, T):
    "transformers' MiniMax has a lightning layer of its own: with its projections, our op must reproduce the input of its output norm."
    mm = pytest.importorskip("transformers.models.minimax.modeling_minimax")
    torch.manual_seed(0)
    config = mm.MiniMaxConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=3, block_size=block, vocab_size=9)
    layer, x, inner = mm.MiniMaxLightningAttention(config, layer_idx=1), torch.randn(2, T, 32), []
    layer.norm.register_forward_pre_hook(lambda module, args: inner.append(args[0].detach()))
    with torch.no_grad():
        layer(x, position_embeddings=None, attention_mask=None)
        q, k, v = layer.act_fn(layer.qkv_proj(x)).view(2, T, 4, 24).split(8, -1)
        o, _ = dispatch.lightning(q, k, v, -layer.slope_rate.flatten(), scale=1.)
    assert error(o.flatten(2), inner[0].double()) < 1e-5


def fla_witness(op):
    "flash-linear-attention's plain PyTorch functions, which run anywhere (importing fla without a GPU warns)."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if op == "lightning":
            naive = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
            return lambda q, k, v, g, S: naive(q, k, v, g, initial_state=S, output_final_state=True)
        if op == "gla":
            naive = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
            return lambda q, k, v, g, S: naive(q, k, v, g, initial_state=S, output_final_state=True)
        naive = pytest.importorskip("fla.ops.gated_delta_rule.naive").naive_recurrent_gated_delta_rule
        return lambda q, k, v, g, beta, S: naive(q, k, v, beta, g, initial_state=S, output_final_state=True)


def qwen_witness(name):
    function = getattr(pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next"), name)
    function = getattr(function, "__wrapped__", function)              # the wrapper would look for a kernel
    return lambda q, k, v, g, beta, S: function(q, k, v, g=g, beta=beta, initial_state=S, output_final_state=True)


WITNESSES = [(op, "fla") for op in OPS] + [("gdn", "torch_chunk_gated_delta_rule"), ("gdn", "torch_recurrent_gated_delta_rule")]

@pytest.mark.parametrize("op,who", WITNESSES)
def test_others_agree(op, who):
    witness = fla_witness(op) if who == "fla" else qwen_witness(who)
    for T in (1, 100):
        for form in (getattr(fast, op), getattr(reference, op)):
            *x, S = inputs(op, T)
            for a, b in zip(form(*x, state=S), witness(*x, S)): assert error(a, b.double()) < 1e-5


FORMS_OF = [(op, name) for op in OPS for name in ("fast", "reference", "dispatch")]

@pytest.mark.parametrize("op,where", FORMS_OF)
@pytest.mark.parametrize("T", [1, 5, 64, 130])
@pytest.mark.parametrize("what", ["rows", "heads"])
def test_no_rows_no_heads(op, where, T, what):
    "Empty output, state and gradients, of the right shapes, with and without a state coming in."
    form = getattr({"fast": fast, "reference": reference, "dispatch": dispatch}[where], op)
    per_head = [torch.zeros(H)] if op == "lightning" else []
    for with_state in (False, True):
        q, k, v, g, *rest, S = inputs(op, T, with_state=with_state)
        for decay in [g, *per_head]:
            x = [q, k, v, decay, *rest]
            if what == "rows": x = [t if t.ndim == 1 else t[:0] for t in x]
            else: x = [t[:0] if t.ndim == 1 else t[:, :, :0] for t in x]
            S_in = None if S is None else S[:0] if what == "rows" else S[:, :0]
            o, S_out, *grads = results(form, *x, S_in)
            given = x if S_in is None else [*x, S_in]
            rows, heads = x[0].shape[0], x[0].shape[2]
            assert o.shape == (rows, T, heads, DV) and S_out.shape == (rows, heads, DK, DV)
            assert [d.shape for d in grads] == [t.shape for t in given]
            assert not any(d.any() for d in grads)


@pytest.mark.parametrize("op,where", FORMS_OF)
@pytest.mark.parametrize("T", [1, 5, 130])
def test_nan_is_not_a_bad_decay(op, where, T):
    "A NaN comes out as NaN, for the training loop to find; a positive decay is refused."
    form = getattr({"fast": fast, "reference": reference, "dispatch": dispatch}[where], op)
    q, k, v, g, *rest, S = inputs(op, T)
    bad = g.clone()
    bad[0, T - 1] = torch.nan
    o, S_out = form(q, k, v, bad, *rest, state=S)
    assert o[0, T - 1].isnan().all() and S_out[0].isnan().all()
    torch.testing.assert_close(o[1], form(q, k, v, g, *rest, state=S)[0][1])
    bad[0, T - 1] = 0.5
    with pytest.raises(ValueError, match="should be <= 0 everywhere .* got 0.5"):
        form(q, k, v, bad, *rest, state=S)


@pytest.mark.parametrize("mixer", OPS)
def test_fit_finds_what_is_not_finite(mixer):
    "An infinite embedding stops stage 1 with the loop's message, whatever the mixer."
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    teacher = LlamaForCausalLM(config).eval()
    with torch.no_grad(): teacher.model.embed_tokens.weight[7] = float("inf")
    rows = [{"input_ids": torch.tensor([5, 6, 7, 8] * 8)}] * 4
    with pytest.raises(FloatingPointError, match="step"):
        fm.align(fm.morph(teacher, mixer), rows, steps=2, batch_size=2, warmup=1, progress=False)
