"Every form of `lightning` against the recurrence in float64, and against an implementation that is not ours."
import pytest
import torch

from flashmorph.mixers import lightning_log_decay
from flashmorph.ops import chunked, dispatch, reference

LENGTHS = (1, 2, 63, 64, 65, 257, 1000)
H = 3
DECAYS = {
    "none": lambda B, T: torch.zeros(H),
    "random": lambda B, T: -torch.rand(H),
    "ladder": lambda B, T: lightning_log_decay(H),
    "strong": lambda B, T: torch.full((H,), -20.),
    "per token": lambda B, T: -torch.rand(B, T, H),
    "padding": lambda B, T: -torch.rand(H) * (torch.rand(B, T, 1) < 0.7),
    "extreme": lambda B, T: torch.where(torch.rand(B, T, H) < 0.05, -1000., -0.01),
}


def inputs(T, decay, with_state=True, B=2, Dk=8, Dv=12):
    torch.manual_seed(T)
    q, k, v = torch.randn(B, T, H, Dk), torch.randn(B, T, H, Dk), torch.randn(B, T, H, Dv)
    return [q, k, v, DECAYS[decay](B, T), torch.randn(B, H, Dk, Dv) if with_state else None]


def results(form, q, k, v, g, state):
    "Output, final state, and gradients of a random function of both with respect to q, k, v and the state."
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, state)]
    o, S = form(*leaves[:3], g, state=leaves[3])
    gen = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=gen).to(x)).sum() for x in (o, S))
    return [o, S, *torch.autograd.grad(loss, [x for x in leaves if x is not None])]


def truth(*x): return results(reference.lightning, *(None if t is None else t.double() for t in x))
def error(a, b): return ((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", LENGTHS)
def test_chunked_is_the_recurrence(T, decay):
    for with_state in (False, True):
        x = inputs(T, decay, with_state)
        got = results(chunked.lightning, *x)
        assert all(t.isfinite().all() for t in got)
        worst = max(error(a, b) for a, b in zip(got, truth(*x), strict=True))
        assert worst <= 1e-5, worst


@pytest.mark.parametrize("decay", DECAYS)
def test_float32_recurrence_and_step(decay):
    for T, form in ((65, reference.lightning), (1, reference.lightning), (1, dispatch.lightning_step)):
        x = inputs(T, decay)
        assert max(error(a, b) for a, b in zip(results(form, *x), truth(*x), strict=True)) <= 1e-5


@pytest.mark.parametrize("per_token", [False, True])
def test_gradient_of_the_decay(per_token):
    q, k, v, _, S = (x.double() for x in inputs(70, "random"))
    g = (-torch.rand(*((2, 70, H) if per_token else (H,)), dtype=torch.float64)).requires_grad_()
    a, b = (torch.autograd.grad(form(q, k, v, g, state=S)[0].sin().sum(), g)[0] for form in (chunked.lightning, reference.lightning))
    assert error(a, b) < 1e-10


def test_state_is_carried():
    q, k, v, g, S = inputs(300, "random")
    whole, end = dispatch.lightning(q, k, v, g, state=S)
    cuts, parts = sorted({0, 300, *torch.randint(1, 300, (6,)).tolist()}), []
    for a, b in zip(cuts, cuts[1:]):
        o, S = dispatch.lightning(q[:, a:b], k[:, a:b], v[:, a:b], g, state=S)
        parts.append(o)
    assert error(torch.cat(parts, 1), whole.double()) < 1e-5 and error(S, end.double()) < 1e-5


@pytest.mark.parametrize("form", [reference.lightning, chunked.lightning])
def test_dtypes_autocast_strides(form):
    q, k, v, g, S = inputs(70, "random")
    expected = form(q, k, v, g, state=S, scale=0.7)
    with torch.autocast("cpu", torch.bfloat16): under = form(q, k, v, g, state=S, scale=0.7)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    for a, b, c in zip(expected, under, form(*strided, g, state=S, scale=0.7)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c)
    torch.testing.assert_close(expected[0], form(0.7 * q, k, v, g, state=S, scale=1.)[0])
    for dtype, state_dtype in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        o, S2 = form(q.to(dtype), k.to(dtype), v.to(dtype), g)
        assert (o.dtype, S2.dtype) == (dtype, state_dtype)


def test_memory_is_linear():
    def kept(T):
        q, k, v, g, _ = inputs(T, "random", B=1, Dk=16, Dv=16)
        seen = {}
        def note(x): seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(); return x
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): out = chunked.lightning(*(x.requires_grad_() for x in (q, k, v)), g)
        return sum(seen.values()), out
    small, large = kept(1024)[0], kept(4096)[0]
    assert 3.5 < large / small < 4.2


def test_step_takes_one_token():
    with pytest.raises(ValueError, match="one token"): dispatch.lightning_step(*inputs(2, "random")[:4])


def test_wishes():
    long, short = inputs(9, "random")[:4], inputs(1, "random")[:4]
    assert "'torch'" in dispatch.lightning_report(long[0]) and "'step'" in dispatch.lightning_report(short[0])
    for wish in ("step", "troch", "cuda", 3):
        with pytest.raises(ValueError, match="available here: torch, reference"): dispatch.lightning(*long, impl=wish)
    with pytest.raises(ValueError, match="did you mean 'torch'"): dispatch.lightning(*long, impl="troch")


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
