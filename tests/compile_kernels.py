"""Compile the kernels for GPUs that are not here, through the very code that launches them, and print what the assembler says of each.

`python tests/compile_kernels.py [CAPABILITY:DTYPE:WIDTH...]`, such as 90:bfloat16:128, or all that matter. Needs no GPU, only the assembler
that comes with Triton. One line of JSON a kernel. Not collected by pytest: `test_kernels.py` runs it."""
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from flashmorph.ops import blocks, kernels, steps

HOMES = {"scan_kernel": kernels, "carry_kernel": kernels, "step_kernel": steps}
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


class Driver:
    "What Triton asks of a GPU before it compiles."
    def __init__(self, capability): self.capability = capability
    def get_current_target(self): return GPUTarget("cuda", self.capability, 32)
    def get_current_device(self): return self.capability
    def get_current_stream(self, device): return 0


class Compiled:
    "Stands for a kernel: a launch only compiles, and notes the result."
    def __init__(self, kernel, notes): self.kernel, self.notes = kernel, notes
    def __getitem__(self, grid):
        def launch(*args, **options):
            binary = self.kernel.warmup(*args, grid=grid, **options)
            if all(binary is not seen for _, seen in self.notes): self.notes.append((self.kernel.fn.__name__, binary))
        return launch


def assembled(binary, capability):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(binary.asm["ptx"])
        arch = "sm_90a" if capability == 90 else f"sm_{capability}"
        said = subprocess.run([PTXAS, "-v", f"--gpu-name={arch}", source, "-o", f"{source}.o"], capture_output=True, text=True, check=True).stderr
    return {"registers": int(re.search(r"Used (\d+) registers", said)[1]), "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1])}


def compile_all(capability, dtype, width):
    "Forward and backward with segments and a state coming in, the same of packed rows, then the three steps."
    driver.set_active(Driver(capability))
    notes, T = [], 128
    for name, module in HOMES.items(): setattr(module, name, Compiled(originals[name], notes))
    kernels.unsupported, kernels.segment_length = (lambda *tensors: ""), (lambda k, v: 64)
    blocks._device = lambda x: (capability >= 90, 132)
    q, k, v = (torch.randn(1, T, 2, width, dtype=dtype, requires_grad=True) for _ in range(3))
    state, g = torch.randn(1, 2, width, width, requires_grad=True), -torch.rand(2)
    o, S = kernels.lightning(q, k, v, g, state=state)
    (o.float().square().sum() + S.square().sum()).backward()
    o, S = kernels.lightning(q, k, v, g, state=state, starts=torch.arange(T)[None] % 50 == 0)
    (o.float().square().sum() + S.square().sum()).backward()
    with torch.no_grad():
        token, g = (x[:, :1] for x in (q, k, v)), g.expand(1, 1, 2)
        q, k, v = token
        steps.lightning_step(q, k, v, g[0, 0], state=state)
        steps.gla_step(q, k, v, g[..., None].expand(k.shape), state=state)
        steps.gdn_step(q, k, v, g, g.exp(), state=state, inplace=True)
    for name, binary in notes:
        print(json.dumps({"kernel": name, "capability": capability, "dtype": str(dtype)[6:], "width": width, "shared": binary.metadata.shared,
                          "matrix": len(re.findall(r"wgmma.mma_async|mma.sync", binary.asm["ptx"])), **assembled(binary, capability)}), flush=True)


if __name__ == "__main__":
    originals = {name: getattr(module, name) for name, module in HOMES.items()}
    some = sys.argv[1:] or [f"{c}:{d}:{w}" for c in (90, 80) for d in ("bfloat16", "float16", "float32") for w in (16, 32, 64, 128, 256)]
    for capability, dtype, width in (x.split(":") for x in some): compile_all(int(capability), getattr(torch, dtype), int(width))
