"""The Triton kernels under the interpreter against the recurrences in float64. It shows that they compute the right thing, not how fast:
`gpu_ops.py` does both on a GPU."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from flashmorph.ops import blocks, dispatch, kernels, reference, steps

pytestmark = [pytest.mark.interpret, pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="set TRITON_INTERPRET=1")]

TOL = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
DECAYS = torch.tensor([0., -0.02, -20., -1000.])  # one head each; errors are taken head by head
H = len(DECAYS)


@pytest.fixture(autouse=True)
def honest(monkeypatch):
    "New tensors are full of NaN, so that what is not written shows; products of bfloat16, which Triton 3.7 interprets as integers, are mended."
    empty, dot = torch.empty, interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(torch, "empty", lambda *shape, **kw: empty(*shape, **kw).fill_(torch.nan))
    def create_dot(self, a, b, *rest): return dot(self, *(self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def inputs(T, dtype=torch.float32, with_state=True, B=1, Dk=16, Dv=32):
    torch.manual_seed(T)
    return [*(torch.randn(B, T, H, D).to(dtype) for D in (Dk, Dk, Dv)), DECAYS, torch.randn(B, H, Dk, Dv) if with_state else None]


def results(form, q, k, v, g, state, **kw):
    "Output, final state, and gradients of a random function of both; all with the heads in front."
    leaves = [x if x is None else x.detach().requires_grad_() for x in (q, k, v, state)]
    o, S = form(*leaves[:3], g, state=leaves[3], **kw)
    gen = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=gen).to(x)).sum() for x in (o, S))
    dq, dk, dv, *dS = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [x.transpose(0, 2) for x in (o, dq, dk, dv)] + [x.transpose(0, 1) for x in (S, *dS)]


def error(a, b): return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(a, b, strict=True))


def check(x, tol, **kw):
    truth = results(reference.lightning, *(None if t is None else t.double() for t in x), **kw)
    got = results(kernels.lightning, *x, **kw)
    assert all(t.isfinite().all() for t in got)
    worst = [error(a, b) for a, b in zip(got, truth, strict=True)]
    assert max(worst) <= tol, worst


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 2, 63, 64, 65, 130])
def test_is_the_recurrence(T, dtype, with_state): check(inputs(T, dtype, with_state), TOL[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T, L", [(65, 64), (192, 64), (300, 128)])
def test_in_segments(T, L, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "segment_length", lambda k, v: L)
    check(inputs(T, dtype), TOL[dtype])
    check(inputs(T, dtype, with_state=False), TOL[dtype])


@pytest.mark.parametrize("Dk, Dv", [(16, 16), (32, 32), (64, 64), (64, 32), (1, 3), (20, 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_widths(Dk, Dv, dtype): check(inputs(65, dtype, B=2, Dk=Dk, Dv=Dv), TOL[dtype])


@pytest.mark.parametrize("Dk, Dv, dtype", [(128, 128, torch.bfloat16), (256, 32, torch.bfloat16), (64, 256, torch.float32), (256, 256, torch.float16)])
def test_great_widths(Dk, Dv, dtype): check(inputs(17, dtype, Dk=Dk, Dv=Dv), TOL[dtype])


def test_on_older_gpus(monkeypatch):
    monkeypatch.setattr(blocks, "_device", lambda x: (False, 108))
    for D in (64, 128): check(inputs(65, torch.bfloat16, Dk=D, Dv=D), TOL[torch.bfloat16])


def test_scale():
    for scale in (1., 0.): check(inputs(20), 1e-5, scale=scale)


def test_carrying_the_state_over_is_one_call():
    x = inputs(100, B=2)
    def in_two(q, k, v, g, *, state):
        o, S = kernels.lightning(q[:, :37], k[:, :37], v[:, :37], g, state=state)
        o_, S = kernels.lightning(q[:, 37:], k[:, 37:], v[:, 37:], g, state=S)
        return torch.cat([o, o_], 1), S
    truth = results(reference.lightning, *(t.double() for t in x))
    assert max(error(a, b) for a, b in zip(results(in_two, *x), truth, strict=True)) <= 1e-5


LAYOUTS = {
    "slices of a fused projection": (lambda x: torch.cat([x, x, x], -1)[..., 16:32], False),
    "heads before tokens": (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), False),
    "tokens first": (lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), False),
    "widths apart": (lambda x: x.repeat_interleave(2, -1)[..., ::2], True),
    "one head for all": (lambda x: x[:, :, :1].expand(-1, -1, H, -1), False),
}

@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, monkeypatch):
    monkeypatch.setattr(kernels, "segment_length", lambda k, v: 64)
    change, copied = LAYOUTS[layout]
    q, k, v, g, state = inputs(70, B=2, Dk=16, Dv=16)
    q, k, v = (change(x) for x in (q, k, v))
    assert not q.is_contiguous() and (kernels._rows(q) is not q) == copied
    check([q, k, v, g, state.transpose(2, 3)], 1e-5)


def test_only_the_gradients_that_are_asked_for():
    q, k, v, g, state = inputs(20)
    for part in (0, 1):
        for wanted in range(4):
            leaves = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate((q, k, v, state))]
            truth = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate((q, k, v, state))]
            for form, x in ((kernels.lightning, leaves), (reference.lightning, truth)):
                out = form(*x[:3], g.to(x[0]), state=x[3])[part]
                if out.requires_grad: out.sum().backward()  # of `expand`ed ones
            got, want = leaves[wanted].grad, truth[wanted].grad
            if want is None: assert got is None or not got.any()
            else: assert error(got[None], want[None]) <= 1e-5
            assert all(x.grad is None for i, x in enumerate(leaves) if i != wanted)


def test_segments_fill_the_chip_and_stay_long():
    def segments(B, T, heads, D):
        x = torch.empty(B, T, heads, D, dtype=torch.bfloat16, device="meta")
        L = kernels.segment_length(x, x)
        assert L % 64 == 0
        return triton.cdiv(T, L)
    assert segments(4, 4096, 16, 128) == 1 and segments(64, 1, 16, 128) == 1 and segments(1, 1000, 1, 64) == 1
    for B, T, heads, D in ((1, 65536, 16, 128), (1, 8192, 4, 64), (1, 1_000_000, 1, 64), (2, 3000, 3, 256)):
        programs = B * heads * triton.cdiv(D, blocks.pick_blocks(torch.empty(1, 1, 1, D, dtype=torch.bfloat16), D).BZ)
        N = segments(B, T, heads, D)
        assert N > 1 and programs * N <= 2 * 132 and T // N >= blocks.SEGMENT


STEPS = [(mixer, 16, 16, dtype) for mixer in ("lightning", "lightning per token", "gla", "gdn") for dtype in TOL] + \
    [(mixer, *widths, torch.float32) for mixer in ("lightning", "gla", "gdn") for widths in ((64, 32), (20, 70))] + [("gdn", 128, 256, torch.bfloat16)]

@pytest.mark.parametrize("mixer, Dk, Dv, dtype", STEPS)
def test_steps(mixer, Dk, Dv, dtype):
    B, T, op = 1 if Dk > 64 else 2, 2, mixer.split()[0]
    for with_state in (False, True):
        q, k, v, g, state = inputs(T, dtype, with_state, B, Dk, Dv)
        k, beta = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype), torch.rand(B, T, H).to(dtype)
        if mixer != "lightning": g = torch.rand(B, T, H) * DECAYS.clamp(min=-20)
        if mixer == "gla": g = g[..., None] * torch.rand(Dk)
        more = [beta] if mixer == "gdn" else []
        truth, S_truth = getattr(reference, op)(*(x.double() for x in (q, k, v, g, *more)), state=None if state is None else state.double())
        S, outputs = state, []
        for t in range(T):
            token, before, kept = [x if x is DECAYS else x[:, t:t + 1] for x in (q, k, v, g, *more)], S, None if S is None else S.clone()
            o, S = getattr(steps, f"{op}_step")(*token, state=S, inplace=t > 0)
            outputs.append(o)
            if before is not None: assert S is before if t else torch.equal(before, kept)
        assert o.dtype == dtype and S.dtype == torch.float32
        assert error(S.transpose(0, 1), S_truth.transpose(0, 1)) <= 1e-5  # the state is float32 whatever the inputs are
        assert error(torch.cat(outputs, 1).transpose(0, 2), truth.transpose(0, 2)) <= TOL[dtype]


def test_wrong_steps_are_refused():
    q, k, v, g, state = inputs(1)
    ok = {"gla": [torch.zeros_like(k)], "gdn": [torch.zeros(1, 1, H), torch.zeros(1, 1, H)], "lightning": [g]}
    for mixer, gates in ok.items():
        step = getattr(steps, f"{mixer}_step")
        step(q, k, v, *gates, state=state)
        with pytest.raises(ValueError, match="no gradient"): step(q.clone().requires_grad_(), k, v, *gates, state=state)
        with pytest.raises(ValueError, match="state should have shape"): step(q, k, v, *gates, state=state[:, 1:])
        for S in (None, state.double(), state.transpose(2, 3).contiguous().transpose(2, 3)):
            with pytest.raises(ValueError, match="inplace needs"): step(q, k, v, *gates, state=S, inplace=True)
    with pytest.raises(ValueError, match="log_decay should have shape"): steps.gla_step(q, k, v, g)
    with pytest.raises(ValueError, match="widths up to 256"): steps.gla_step(*(torch.randn(1, 1, 2, 300) for _ in range(3)), torch.zeros(1, 1, 2, 300))
    with pytest.raises(ValueError, match="not torch.float64"): steps.gdn_step(q.double(), k, v, *ok["gdn"])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    "What the assembler says of kernels compiled for GPUs, in a process of its own that does not interpret."
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), "90:bfloat16:128", "80:bfloat16:64", "90:float32:32"]
    return [json.loads(line) for line in subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()]


def test_compile_for_gpus(report):
    "Every kernel, through the code that launches them: on the matrix units, nothing spilled, within the shared memory of one multiprocessor."
    assert {(x["kernel"], x["capability"], x["width"]) for x in report} >= {
        (kernel, *which) for kernel in ("scan_kernel", "carry_kernel", "step_kernel") for which in ((90, 128), (80, 64), (90, 32))}
    for x in report:
        assert x["shared"] <= (227 if x["capability"] == 90 else 99) * 1024, x
        assert x["spilled"] <= 16, x
        assert x["matrix"] > 0 or x["kernel"] != "scan_kernel", x


def test_kernels_without_a_gpu_say_so():
    code = "import torch; from flashmorph.ops import kernels as k; x = torch.ones(1, 2, 1, 16); k.lightning(x, x, x, -torch.ones(1))"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stderr
    assert "ValueError: the kernels need a CUDA device, q is on cpu" in said


@pytest.mark.parametrize("T", [1, 70, 3000])
def test_no_rows(T):
    "Empty output, state and gradients; with many tokens the rule for segments has no programs to count."
    q, k, v, g, state = inputs(T)
    leaves = [x[:0].clone().requires_grad_() for x in (q, k, v, state)]
    o, S = kernels.lightning(*leaves[:3], g, state=leaves[3])
    assert o.shape == (0, T, H, 32) and S.shape == (0, H, 16, 32)
    grads = torch.autograd.grad(o.sum() + S.sum(), leaves)
    assert [d.shape for d in grads] == [x.shape for x in leaves]


@pytest.mark.parametrize("T, length", [(70, None), (133, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_packed_rows(T, length, dtype, monkeypatch):
    "Outputs, states and gradients of documents in a row are those of each by itself, in segments too."
    if length: monkeypatch.setattr(kernels, "segment_length", lambda k, v: length)
    q, k, v, g, state = inputs(T, B=2)
    starts = torch.zeros(len(q), T, dtype=torch.bool)
    starts[:, [1, 31, 32, 64, 65]] = starts[0, 0] = True
    leaves = [x.detach().to(dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate((q, k, v, state))]
    o, S = dispatch.lightning(*leaves[:3], g, state=leaves[3], starts=starts, impl="triton")
    slope = torch.randn(o.shape)
    got = torch.autograd.grad((o.float() * slope).sum() + S.sum(), leaves)
    wanted, pieces = [x.detach().double().requires_grad_() for x in leaves], []
    for row in range(len(q)):
        at = sorted({0, *starts[row].nonzero()[:, 0].tolist()})
        for a, b in zip(at, [*at[1:], T]):
            past = wanted[3][row:row + 1] if a == 0 and not starts[row, 0] else None
            pieces.append(reference.lightning(*(x[row:row + 1, a:b] for x in wanted[:3]), g.double(), state=past))
            if b == T: pieces[-1] = (*pieces[-1], True)
    alone = torch.cat([piece[0] for piece in pieces], 1).view(o.shape)
    last = torch.cat([piece[1] for piece in pieces if len(piece) == 3])
    truth = torch.autograd.grad((alone * slope.double()).sum() + last.sum(), wanted)
    for a, b in zip((o, S, *got), (alone, last, *truth)): assert error(a, b) <= TOL[dtype]
