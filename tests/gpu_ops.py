"""Check the Triton kernels on a GPU, then time them against flash-linear-attention where it can be imported: a table, and JSON.

    python tests/gpu_ops.py [--json FILE] [--sweep] [--no-checks]

A script, not collected by pytest, and the part `kernels` of `gpu_all.py`; the checks compile some hundred kernels, which takes minutes. **It has not been run on a GPU yet**:
what `BLOCKS` and `segment_length` say rests on arithmetic and on the assembler's report. `--sweep` times other block sizes and numbers of
segments, to fill them in from measurement. Each time is a median by device events with the L2 cache emptied in between; `share` is the least
time that bytes or arithmetic allow at the rates measured here, over the time taken."""
import argparse
import functools
import itertools
import json
import statistics
import sys

import torch
import triton

from flashmorph.ops import kernels, meter, reference, steps

TOL = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-2}
SIZES = {"B4 H16 D128 T4096": (4, 4096, 16, 128), "B1 H16 D128 T65536": (1, 65536, 16, 128), "B8 H16 D64 T2048": (8, 2048, 16, 64),
         "B1 H16 D128 T512": (1, 512, 16, 128)}
BATCHES = (1, 16, 128)  # rows decoded at once, with 16 heads of 128


def error(a, b): return max(((x.double() - y).norm() / y.norm().clamp(min=1e-30)).item() for x, y in zip(a, b, strict=True))


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
    torch.empty = lambda *shape, **kw: empty(*shape, **kw).fill_(torch.nan) if kw.get("dtype", torch.float32).is_floating_point else empty(*shape, **kw)
    try: return form(*args, **kwargs)
    finally: torch.empty = empty


LENGTHS = (1, 2, 63, 64, 65, 257, 1000)
WIDTHS = ((16, 16), (32, 64), (64, 64), (128, 128), (128, 64), (256, 256), (20, 80))


def check_lightning(device, lengths=LENGTHS, widths=WIDTHS, dtypes=tuple(TOL)):
    "Worst relative error of anything, for each dtype, with one segment and with many."
    worst, rule, g = {}, kernels.segment_length, torch.tensor([0., -0.02, -20., -1000.], device=device)
    for dtype, (Dk, Dv), T, with_state in itertools.product(dtypes, widths, lengths, (False, True)):
        if T > 65 and (Dk, Dv) != (128, 128) or dtype == torch.float16 and Dk not in (16, 64, 128): continue  # compiling takes its time, too
        x = [torch.randn(2, T, 4, D, device=device).to(dtype) for D in (Dk, Dk, Dv)] + [g, torch.randn(2, 4, Dk, Dv, device=device) if with_state else None]
        truth = results(reference.lightning, *(None if t is None else t.double() for t in x))
        for L in (None, 64):
            kernels.segment_length = rule if L is None else lambda k, v: 64
            try: got = poisoned(results, kernels.lightning, *x)
            finally: kernels.segment_length = rule
            e = max(error(a, b) for a, b in zip(got, truth, strict=True))
            if not e <= TOL[dtype]: raise AssertionError(f"lightning {dtype} Dk={Dk} Dv={Dv} T={T} state={with_state} segment={L}: relative error {e:.1e}")
            worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0.), e)
    return worst


def in_two(q, k, v, g, *, state):
    "Lightning attention in two calls; the state is carried over."
    cut = q.shape[1] // 2 + 1
    before, S = kernels.lightning(q[:, :cut], k[:, :cut], v[:, :cut], g, state=state)
    after, S = kernels.lightning(q[:, cut:], k[:, cut:], v[:, cut:], g, state=S)
    return torch.cat([before, after], 1), S


def check_carried(device, lengths=(65, 257), widths=((16, 16), (128, 128)), dtypes=tuple(TOL)):
    "Worst relative error of two calls, each with a part of the tokens, for each dtype."
    worst, g = {}, torch.tensor([0., -0.02, -20., -1000.], device=device)
    for dtype, (Dk, Dv), T in itertools.product(dtypes, widths, lengths):
        x = [torch.randn(2, T, 4, D, device=device).to(dtype) for D in (Dk, Dk, Dv)]
        x += [g, torch.randn(2, 4, Dk, Dv, device=device)]
        truth = results(reference.lightning, *(t.double() for t in x))
        got = poisoned(results, in_two, *x)
        e = max(error(a, b) for a, b in zip(got, truth, strict=True))
        if not e <= TOL[dtype]: raise AssertionError(f"lightning in two calls {dtype} Dk={Dk} Dv={Dv} T={T}: relative error {e:.1e}")
        worst[str(dtype)[6:]] = max(worst.get(str(dtype)[6:], 0.), e)
    return worst


def check_steps(device, widths=((16, 16), (64, 128), (128, 128), (256, 256), (20, 80)), dtypes=tuple(TOL), batches=(1, 64)):
    worst = {}
    for op, (Dk, Dv), dtype, B in itertools.product(("lightning", "gla", "gdn"), widths, dtypes, batches):
        q, k, v, g = step_inputs(op, B, 4, Dk, Dv, dtype, device)
        state = torch.randn(B, 4, Dk, Dv, device=device)
        truth, S_truth = getattr(reference, op)(*(x.double() for x in (q, k, v, *g)), state=state.double())
        for inplace in (False, True):
            o, S = poisoned(getattr(steps, f"{op}_step"), q, k, v, *g, state=state.clone(), inplace=inplace)
            e = max(error(o.transpose(0, 2), truth.transpose(0, 2)), error(S.transpose(0, 1), S_truth.transpose(0, 1)))
            if not e <= TOL[dtype]: raise AssertionError(f"{op}_step {dtype} Dk={Dk} Dv={Dv} B={B} inplace={inplace}: relative error {e:.1e}")
            worst[op] = max(worst.get(op, 0.), e)
    return worst


def step_inputs(op, B, H, Dk, Dv, dtype, device):
    q, k, v = (torch.randn(B, 1, H, D, device=device).to(dtype) for D in (Dk, Dk, Dv))
    k = torch.nn.functional.normalize(k.float(), dim=-1).to(dtype)
    if op == "lightning": return q, k, v, [-torch.rand(H, device=device)]
    if op == "gla": return q, k, v, [-torch.rand(B, 1, H, Dk, device=device)]
    return q, k, v, [-torch.rand(B, 1, H, device=device), torch.rand(B, 1, H, device=device)]


def bench(call):
    "Median milliseconds; without a GPU of three calls, under the interpreter."
    if torch.cuda.is_available(): return triton.testing.do_bench(call, warmup=50, rep=300, return_mode="median")
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
    return {"lightning": lambda q, k, v, g: chunk_simple_gla(q, k, v, g_gamma=g, **more),
            "lightning_step": lambda q, k, v, g, S: fused_recurrent_simple_gla(q, k, v, g_gamma=g, initial_state=S, **more),
            "gla_step": lambda q, k, v, g, S: fused_recurrent_gla(q, k, v, gk=g, initial_state=S, **more),
            "gdn_step": lambda q, k, v, g, beta, S: fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=S, **more)}[op]


def row(rows, what, ours, theirs, least):
    rows.append({"what": what, "ours_us": round(1e3 * ours, 2), "fla_us": theirs and round(1e3 * theirs, 2), "ratio": theirs and round(ours / theirs, 3),
                 "share": round(least / ours, 3)})
    beside = f"{1e3 * theirs:10.1f} us   ratio {ours / theirs:5.2f}" if theirs else "-"
    print(f"{what:44} {1e3 * ours:10.1f} us   fla {beside:>28}   share {least / ours:5.2f}", flush=True)


def compare(ceiling, sizes=SIZES, batches=BATCHES, heads=(16, 128), device="cuda", dtype=torch.bfloat16):
    "Rows of times: lightning attention, then one token of each op with `heads` (number, width)."
    rows, fla = [], peer("lightning")
    bytes_s, flops_s = ceiling["bytes"], ceiling["flops"]
    for name, (B, T, H, D) in sizes.items():
        qkv, do, g = lightning_inputs(B, T, H, D, device, dtype)
        ours = timed(kernels.lightning, qkv, do, g)
        theirs = timed(fla, qkv, do, g) if fla else (None, None)
        if fla:
            a, b = (torch.autograd.grad(form(*qkv, g)[0], qkv, do) for form in (kernels.lightning, fla))
            apart = max(((x - y).double().norm() / y.double().norm()).item() for x, y in zip(a, b))
            assert apart < 2e-2, f"gradients differ from fla's by {apart:.1e}"
        for what, t, f, tensors, passes in (("forward", ours[0], theirs[0], 4, 1), ("forward+backward", ours[1], theirs[1], 11, 4)):
            least = 1e3 * max(tensors * B * T * H * D * 2 / bytes_s, passes * B * T * H * (4 * 64 * D + 4 * D * D) / flops_s)
            row(rows, f"lightning {name} {what}", t, f, least)
    H, D = heads
    for op, B in itertools.product(("lightning", "gla", "gdn"), batches):
        q, k, v, gates = step_inputs(op, B, H, D, D, dtype, device)
        state, fla = torch.randn(B, H, D, D, device=device), peer(f"{op}_step")
        with torch.no_grad():
            least = 1e3 * 2 * state.numel() * 4 / bytes_s
            theirs = bench(functools.partial(fla, q, k, v, *gates, state)) if fla else None
            for inplace in (True, False):
                ours = bench(functools.partial(getattr(steps, f"{op}_step"), q, k, v, *gates, state=state, inplace=inplace))
                row(rows, f"{op}_step B{B} H{H} D{D}{' in place' * inplace}", ours, theirs, least)
    return rows


def sweep():
    "Time other blocks and numbers of segments; the table of the module is put back."
    rows, rule, key = [], kernels.segment_length, (torch.bfloat16, kernels._device(torch.empty(1, device="cuda"))[0])
    table = kernels.BLOCKS[key]
    for name, (B, T, H, D) in itertools.islice(SIZES.items(), 3):
        qkv, do, g = lightning_inputs(B, T, H, D)
        for C, BZ, warps, stages in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3)):
            if BZ > D or BZ * C > 64 * 128: continue
            for N in (1, 2, 4, 8):
                if N > 1 and (C != 64 or T // N < kernels.SEGMENT): continue
                kernels.BLOCKS[key] = {256: kernels.Blocks(C, BZ, warps, stages)}
                kernels.segment_length = lambda k, v: triton.cdiv(triton.cdiv(k.shape[1], N), 128) * 128  # noqa: B023
                try: forward, both = timed(kernels.lightning, qkv, do, g)
                except triton.runtime.errors.OutOfResources: continue
                rows.append({"size": name, **kernels.Blocks(C, BZ, warps, stages)._asdict(), "segments": N, "forward_us": 1e3 * forward, "both_us": 1e3 * both})
        for what in ("forward_us", "both_us"):
            print(name, what, *(f"\n    {r}" for r in sorted((r for r in rows if r["size"] == name), key=lambda r: r[what])[:5]), flush=True)  # noqa: B023
    kernels.segment_length, kernels.BLOCKS[key] = rule, table
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--sweep", action="store_true", help="time other block sizes, too")
    parser.add_argument("--no-checks", action="store_true", help="only time: for a second run on code that has been checked")
    options = parser.parse_args()
    if not torch.cuda.is_available(): sys.exit("This needs a CUDA device; without one, TRITON_INTERPRET=1 pytest -m interpret tests/test_kernels.py")
    torch.manual_seed(0)
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    if not options.no_checks:
        found["worst relative errors"] = check_lightning("cuda") | check_steps("cuda")
        check_carried("cuda")
        print("correct; worst relative errors:", {name: f"{e:.1e}" for name, e in found["worst relative errors"].items()}, flush=True)
    found["ceilings"] = meter.ceilings(torch.bfloat16, "cuda")
    print(f"{found['device']}: {found['ceilings']['bytes'] / 1e12:.2f} TB/s, {found['ceilings']['flops'] / 1e12:.0f} TFLOP/s in bfloat16, measured", flush=True)
    found["rows"] = compare(found["ceilings"])
    if options.sweep: found["sweep"] = sweep()
    if options.json:
        with open(options.json, "w") as file: json.dump(found, file, indent=1)
