"""The Triton kernels on a GPU: checked, then timed beside flash-linear-attention where it is there.

    python tests/gpu_ops.py [--json FILE] [--sweep] [--no-checks]

A script, not collected by pytest, and the part `kernels` of `gpu_all.py`. The checks compile some
hundred kernels, which takes minutes. **It has not been run on a GPU yet**: what `BLOCKS` and
`segment_length` say rests on arithmetic and on the assembler's report. `--sweep` times other block
sizes and numbers of segments, to fill them in from measurement. Each time is a median by device
events with the L2 cache emptied in between. `share` is the least time that bytes or arithmetic
allow at the rates measured here, over the time taken."""
import argparse
import functools
import itertools
import json
import statistics
import sys

import torch
import triton

from flashmorph.ops import blocks as blocks_of
from flashmorph.ops import kernels, meter, reference, steps

TOL = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
SIZES = {
    "B4 H16 D128 T4096": (4, 4096, 16, 128),
    "B1 H16 D128 T65536": (1, 65536, 16, 128),
    "B8 H16 D64 T2048": (8, 2048, 16, 64),
    "B1 H16 D128 T512": (1, 512, 16, 128),
}
BATCHES = (1, 16, 128)  # rows decoded at once, with 16 heads of 128
OPS = ("lightning", "gla", "gdn")
DTYPES = tuple(TOL)


def error(a, b):
    "The largest relative error of the parts of `a`."
    parts = zip(a, b, strict=True)
    return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in parts)


def worst_error(got, truth, what, dtype):
    "The largest relative error of several tensors. Raises `AssertionError` if it is too large."
    e = max(error(a, b) for a, b in zip(got, truth, strict=True))
    if e <= TOL[dtype]: return e
    raise AssertionError(f"{what} in {dtype}: relative error {e:.1e}")


def results(form, q, k, v, g, state):
    "Output, final state, gradients of a random function of both; heads in front."
    leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, v, state)]
    o, S = form(*leaves[:3], g, state=leaves[3])
    gen = torch.Generator().manual_seed(0)
    loss = sum((x * torch.randn(x.shape, generator=gen).to(x)).sum() for x in (o, S))
    dq, dk, dv, *dS = torch.autograd.grad(loss, [x for x in leaves if x is not None])
    return [x.transpose(0, 2) for x in (o, dq, dk, dv)] + [x.transpose(0, 1) for x in (S, *dS)]


def poisoned(form, *args, **kwargs):
    "`form(...)` with every new tensor full of NaN, so that what a kernel does not write shows."
    empty = torch.empty

    def poison(*shape, **kw):
        made = empty(*shape, **kw)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    torch.empty = poison
    try: return form(*args, **kwargs)
    finally: torch.empty = empty


LENGTHS = (1, 2, 63, 64, 65, 257, 1000)
WIDTHS = ((16, 16), (32, 64), (64, 64), (128, 128), (128, 64), (256, 256), (20, 80))


def lightning_case(device, dtype, widths, T, with_state=True):
    "q, k, v, decays that are slow and fast, and a state (or `None`): 2 rows of 4 heads."
    Dk, Dv = widths
    q, k, v = (torch.randn(2, T, 4, D, device=device).to(dtype) for D in (Dk, Dk, Dv))
    g = torch.tensor([0., -0.02, -20., -1000.], device=device)
    state = torch.randn(2, 4, Dk, Dv, device=device) if with_state else None
    return q, k, v, g, state


def true_results(x):
    "The results of the recurrence in float64."
    return results(reference.lightning, *(None if t is None else t.double() for t in x))


def is_checked(dtype, widths, T):
    "Not everything: compiling takes its time, too."
    if T > 65 and widths != (128, 128): return False
    return dtype != torch.float16 or widths[0] in (16, 64, 128)


def check_lightning(device, lengths=LENGTHS, widths=WIDTHS, dtypes=DTYPES):
    "Worst relative error of anything, for each dtype, with one segment and with many."
    worst, rule = {}, kernels.segment_length
    for dtype, D, T, stateful in itertools.product(dtypes, widths, lengths, (False, True)):
        if not is_checked(dtype, D, T): continue
        x = lightning_case(device, dtype, D, T, stateful)
        truth = true_results(x)
        for L in (None, 64):
            kernels.segment_length = rule if L is None else lambda k, v: 64
            try: got = poisoned(results, kernels.lightning, *x)
            finally: kernels.segment_length = rule
            what = f"lightning (Dk, Dv)={D} T={T} state={stateful} segment={L}"
            e = worst_error(got, truth, what, dtype)
            worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0.), e)
    return worst


def in_two(q, k, v, g, *, state):
    "Lightning attention in two calls; the state is carried over."
    cut = q.shape[1] // 2 + 1
    before, S = kernels.lightning(q[:, :cut], k[:, :cut], v[:, :cut], g, state=state)
    after, S = kernels.lightning(q[:, cut:], k[:, cut:], v[:, cut:], g, state=S)
    return torch.cat([before, after], 1), S


def check_carried(device, lengths=(65, 257), widths=((16, 16), (128, 128)), dtypes=DTYPES):
    "Worst relative error of two calls, each with a part of the tokens, for each dtype."
    worst = {}
    for dtype, D, T in itertools.product(dtypes, widths, lengths):
        x = lightning_case(device, dtype, D, T)
        got = poisoned(results, in_two, *x)
        what = f"lightning in two calls (Dk, Dv)={D} T={T}"
        e = worst_error(got, true_results(x), what, dtype)
        worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0.), e)
    return worst


STEP_WIDTHS = ((16, 16), (64, 128), (128, 128), (256, 256), (20, 80))


def check_steps(device, widths=STEP_WIDTHS, dtypes=DTYPES, batches=(1, 64)):
    "Worst relative error of one token with a state, for each op."
    worst = {}
    for op, (Dk, Dv), dtype, B in itertools.product(OPS, widths, dtypes, batches):
        q, k, v, g = step_inputs(op, B, 4, Dk, Dv, dtype, device)
        state = torch.randn(B, 4, Dk, Dv, device=device)
        exact = (x.double() for x in (q, k, v, *g))
        truth = by_head(*getattr(reference, op)(*exact, state=state.double()))
        step = getattr(steps, f"{op}_step")
        for inplace in (False, True):
            got = poisoned(step, q, k, v, *g, state=state.clone(), inplace=inplace)
            what = f"{op}_step Dk={Dk} Dv={Dv} B={B} inplace={inplace}"
            e = worst_error(by_head(*got), truth, what, dtype)
            worst[op] = max(worst.get(op, 0.), e)
    return worst


def by_head(o, S):
    "Output and state with the heads in front."
    return o.transpose(0, 2), S.transpose(0, 1)


def step_inputs(op, B, H, Dk, Dv, dtype, device):
    q, k, v = (torch.randn(B, 1, H, D, device=device).to(dtype) for D in (Dk, Dk, Dv))
    k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    if op == "lightning": return q, k, v, [-torch.rand(H, device=device)]
    if op == "gla": return q, k, v, [-torch.rand(B, 1, H, Dk, device=device)]
    return q, k, v, [-torch.rand(B, 1, H, device=device), torch.rand(B, 1, H, device=device)]


def bench(call):
    "Median milliseconds; without a GPU of three calls, under the interpreter."
    if torch.cuda.is_available():
        return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median")
    return 1e3 * statistics.median(meter.timed(call) for _ in range(3))


def lightning_inputs(B, T, H, D, device="cuda", dtype=torch.bfloat16):
    q, k, v, do = (torch.randn(B, T, H, D, device=device, dtype=dtype) for _ in range(4))
    g = -(2. ** (-8 / H * torch.arange(1, H + 1, device=device)))
    return [x.requires_grad_() for x in (q, k, v)], do, g


def timed(form, qkv, do, g):
    "Milliseconds forward, and forward with backward."
    with torch.no_grad(): forward = bench(lambda: form(*qkv, g))
    return forward, bench(lambda: torch.autograd.grad(form(*qkv, g)[0], qkv, do))


def peer(op):
    "fla's function for `op`, by our arguments; None without fla or without a GPU."
    if not torch.cuda.is_available(): return None
    try:
        from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
        from fla.ops.gla import fused_recurrent_gla
        from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla
    except ImportError as problem:
        print(f"fla cannot be imported ({problem}): no comparison")
        return None
    more = {"output_final_state": True}

    def lightning(q, k, v, g): return chunk_simple_gla(q, k, v, g_gamma=g, **more)

    def lightning_step(q, k, v, g, S):
        return fused_recurrent_simple_gla(q, k, v, g_gamma=g, initial_state=S, **more)

    def gla_step(q, k, v, g, S): return fused_recurrent_gla(q, k, v, gk=g, initial_state=S, **more)

    def gdn_step(q, k, v, g, beta, S):
        gates = {"g": g, "beta": beta}
        return fused_recurrent_gated_delta_rule(q, k, v, **gates, initial_state=S, **more)

    known = {"lightning": lightning, "lightning_step": lightning_step,
             "gla_step": gla_step, "gdn_step": gdn_step}
    return known[op]


def row(rows, what, ours, theirs, least):
    "Add a row of milliseconds, and print it."
    found = {"what": what, "ours_us": round(1e3 * ours, 2), "fla_us": None, "ratio": None}
    beside = "-"
    if theirs:
        found |= {"fla_us": round(1e3 * theirs, 2), "ratio": round(ours / theirs, 3)}
        beside = f"{1e3 * theirs:10.1f} us   ratio {ours / theirs:5.2f}"
    found["share"] = round(least / ours, 3)
    rows.append(found)
    print(f"{what:44} {1e3 * ours:10.1f} us   fla {beside:>28}   share {least / ours:5.2f}",
          flush=True)


def check_gradients(fla, qkv, do, g):
    "Raises `AssertionError` if our gradients are not those of fla."
    forms = (kernels.lightning, fla)
    ours, theirs = (torch.autograd.grad(form(*qkv, g)[0], qkv, do) for form in forms)
    parts = zip(ours, theirs, strict=True)
    apart = max(((x - y).double().norm() / y.double().norm()).item() for x, y in parts)
    if not apart < 2e-2: raise AssertionError(f"gradients differ from fla's by {apart:.1e}")


# tensors that are read or written, and passes over the tokens
WORK = {"forward": (4, 1), "forward+backward": (11, 4)}


def least_ms(what, shape, size, ceiling):
    "The milliseconds that lightning attention takes at least; `size` bytes a number."
    B, T, H, D = shape
    tensors, passes = WORK[what]
    moved = tensors * B * T * H * D * size
    operations = passes * B * T * H * (4 * 64 * D + 4 * D * D)
    return 1e3 * max(moved / ceiling["bytes"], operations / ceiling["flops"])


def compare(
    ceiling, sizes=SIZES, batches=BATCHES, heads=(16, 128), device="cuda", dtype=torch.bfloat16
):
    "Rows of times: lightning attention, then one token of each op with `heads` (number, width)."
    rows, fla = [], peer("lightning")
    for name, shape in sizes.items():
        qkv, do, g = lightning_inputs(*shape, device, dtype)
        ours = timed(kernels.lightning, qkv, do, g)
        theirs = timed(fla, qkv, do, g) if fla else (None, None)
        if fla: check_gradients(fla, qkv, do, g)
        for what, t, f in zip(WORK, ours, theirs, strict=True):
            least = least_ms(what, shape, dtype.itemsize, ceiling)
            row(rows, f"lightning {name} {what}", t, f, least)
    for op, B in itertools.product(OPS, batches):
        compare_step(rows, op, (B, *heads), ceiling, device, dtype)
    return rows


@torch.no_grad()
def compare_step(rows, op, shape, ceiling, device, dtype):
    "One token of `(rows, heads, width)`, in place and not."
    B, H, D = shape
    q, k, v, gates = step_inputs(op, B, H, D, D, dtype, device)
    state = torch.randn(B, H, D, D, device=device)
    least = 1e3 * 2 * state.numel() * 4 / ceiling["bytes"]
    fla = peer(f"{op}_step")
    theirs = bench(functools.partial(fla, q, k, v, *gates, state)) if fla else None
    step = functools.partial(getattr(steps, f"{op}_step"), q, k, v, *gates, state=state)
    for inplace in (True, False):
        ours = bench(functools.partial(step, inplace=inplace))
        row(rows, f"{op}_step B{B} H{H} D{D}{' in place' * inplace}", ours, theirs, least)


def block_choices(T, D):
    "Blocks and numbers of segments to try."
    sizes = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3), (1, 2, 4, 8))
    for C, BZ, warps, stages, N in sizes:
        if BZ > D or BZ * C > 64 * 128: continue
        if N > 1 and (C != 64 or T // N < blocks_of.SEGMENT): continue
        yield blocks_of.Blocks(C, BZ, warps, stages), N


def fastest(rows, what):
    "The five fastest rows, a line each."
    return "".join(f"\n    {r}" for r in sorted(rows, key=lambda r: r[what])[:5])


def sweep():
    "Time other blocks and numbers of segments; the table of the module is put back."
    rule = kernels.segment_length
    key = torch.bfloat16, blocks_of._device(torch.empty(1, device="cuda"))[0]
    table = blocks_of.BLOCKS[key]
    rows = []
    try:
        for name, shape in itertools.islice(SIZES.items(), 3): rows += sweep_size(name, shape, key)
    finally:
        kernels.segment_length = rule
        blocks_of.BLOCKS[key] = table
    return rows


def sweep_size(name, shape, key):
    "The times of all choices for one size; they stay in the table of the module."
    _, T, _, D = shape
    qkv, do, g = lightning_inputs(*shape)
    rows = []
    for blocks, N in block_choices(T, D):
        length = triton.cdiv(triton.cdiv(T, N), 128) * 128
        blocks_of.BLOCKS[key] = {256: blocks}
        kernels.segment_length = lambda k, v: length  # noqa: B023
        try: forward, both = timed(kernels.lightning, qkv, do, g)
        except triton.runtime.errors.OutOfResources: continue
        times = {"forward_us": 1e3 * forward, "both_us": 1e3 * both}
        rows.append({"size": name, **blocks._asdict(), "segments": N, **times})
    for what in ("forward_us", "both_us"): print(name, what, fastest(rows, what), flush=True)
    return rows


def checked():
    "The worst relative errors, by what was checked."
    checks = {"lightning": check_lightning, "carried": check_carried, "steps": check_steps}
    return {name: check("cuda") for name, check in checks.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes, too")
    parser.add_argument("--no-checks", action="store_true", help="only time what has been checked")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This needs a CUDA device; without one, "
                 "TRITON_INTERPRET=1 pytest -m interpret tests/test_kernels.py")
    torch.manual_seed(0)
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__,
             "triton": triton.__version__}
    # checks, then times
    if not options.no_checks:
        found["worst relative errors"] = checked()
        print("correct; worst relative errors:", found["worst relative errors"], flush=True)
    found["ceilings"] = meter.ceilings(torch.bfloat16, "cuda")
    rates = [found["ceilings"][name] / 1e12 for name in ("bytes", "flops")]
    print(f"{found['device']}: {rates[0]:.2f} TB/s, {rates[1]:.0f} TFLOP/s in bfloat16, measured",
          flush=True)
    found["rows"] = compare(found["ceilings"])
    if options.sweep: found["sweep"] = sweep()
    if options.json:
        with open(options.json, "w") as file: json.dump(found, file, indent=1)


if __name__ == "__main__": main()
