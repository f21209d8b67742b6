"""Stages on several processes (gloo, CPU): equal to one, in shards, resumed by another number."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from torch.multiprocessing import ProcessExitedException, start_processes
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import flashmorph as fm
from flashmorph.data.stories import Stories
from flashmorph.run.convert import convert
from flashmorph.run.recipe import Recipe, save_recipe
from flashmorph.train.together import rows_each

STEPS, VOCAB = 20, 61
TOL = 1e-5                      # of losses, and of all weights together: sums in another order
COMMON = {"progress": False, "steps": STEPS, "batch_size": 8}


def teacher(dtype=torch.float32, vocab_size=VOCAB):
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        head_dim=16, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
        initializer_range=0.2)).to(dtype).eval()


def mixture_of_experts():
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        head_dim=16, num_attention_heads=2, num_key_value_heads=1, num_experts=6,
        num_experts_per_tok=2, initializer_range=0.2)).eval()


def books(count=8 * STEPS):
    "Rows with padding and answers of unequal lengths, so that means weigh unequally."
    random = torch.Generator().manual_seed(1)

    def below(n): return int(torch.randint(0, n, (1,), generator=random))

    def row():
        ids = torch.randint(0, VOCAB, (24,), generator=random)
        answers, mask = torch.zeros(24, dtype=torch.long), torch.ones(24, dtype=torch.long)
        answers[12:13 + below(8)] = 1
        mask[:below(6)] = 0
        return {"input_ids": ids, "answers": answers, "attention_mask": mask}
    return [row() for _ in range(count)]


def weights(model):
    "All weights in a row."
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def stages(all_kinds):
    "Losses and weights of every stage, by name; perhaps with all kinds of losses and formats."
    rows, found = books(), {}
    adamw = {**COMMON, "optimizer": "adamw"}
    for relative, start in ((False, "copy"), (True, "least-squares"))[0 if all_kinds else 1:]:
        model = fm.morph(teacher(), "gdn(conv=4)")
        result = fm.align(model, rows, start=start, start_tokens=600, relative=relative, **adamw)
        found[f"align, {start}"] = (result.losses, weights(model))
    for align in ("answers", "raw", "relative")[:3 if all_kinds else 1]:
        gates = fm.train_gates(model, rows, align=align, **COMMON)
        found[f"gates, {align}"] = (gates.losses, gates.trajectory)
    for dtype in (torch.float32, torch.bfloat16)[:2 if all_kinds else 1]:
        hybrid = fm.morph(teacher(dtype), "gdn").commit([1])
        result = fm.distill(hybrid, teacher(dtype), rows, **COMMON)
        found[f"distill, {dtype}"] = (result.losses, weights(hybrid))
    if all_kinds:
        model = fm.morph(mixture_of_experts(), "lightning")
        result = fm.align(model, rows, start="copy", **adamw)
        found["align, experts"] = (result.losses, weights(model))
        hybrid = model.commit([1])
        result = fm.distill(hybrid, mixture_of_experts(), rows, **COMMON)
        found["distill, experts"] = (result.losses, weights(hybrid))
    hybrid = fm.morph(teacher(), "lightning").commit([0])
    half = {**COMMON, "steps": STEPS // 2, "accumulate": 2}
    result = fm.finetune(hybrid, rows, recompute=True, **half)
    found["finetune, recompute, accumulate"] = (result.losses, weights(hybrid))
    return found


def in_process(rank, world, port, work, args):
    "Call `work` as launchers do, in a process that knows nothing of trainings before the fork."
    AcceleratorState._reset_state()
    PartialState._reset_state()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world}", **where}
    os.environ["ACCELERATE_USE_CPU"] = "1"
    torch.set_num_threads(1)
    work(*args)
    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()


def processes(world, work, *args):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start_processes(in_process, (world, port, work, args), nprocs=world, start_method="fork")


def rank(): return int(os.environ["RANK"])


def write_stages(file, all_kinds):
    found = stages(all_kinds)
    if rank() == 0: torch.save(found, file)


def far(a, b):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def alone(): return stages(True)


@pytest.mark.parametrize("world", [2, 4])
def test_stages_equal_those_of_one_process(world, alone, tmp_path):
    processes(world, write_stages, tmp_path / "found", world == 2)
    found = torch.load(tmp_path / "found")
    assert len(found) == (10 if world == 2 else 4)
    for name in found:
        losses, end = alone[name]
        assert len(losses) >= STEPS // 2 and far(found[name][0], losses) < TOL, name
        worst = max(abs(a - b) / abs(b) for a, b in zip(found[name][0], losses, strict=True))
        # the first divergence is 6e-4 nats, a difference of float32 numbers near 1
        assert worst < TOL or name == "gates, answers", (name, worst)
        assert far(found[name][1], end) < TOL, name


class Killing:
    "Rows, of which one kills the process that comes to it, if it is the second process."
    def __init__(self, at): self.rows, self.at = books(), at

    def __iter__(self):
        for i, row in enumerate(self.rows):
            if i == self.at and os.environ.get("RANK") == "1": os.kill(os.getpid(), signal.SIGKILL)
            yield row


def repair(folder, at=None):
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    settings = {**COMMON, "run": folder, "resume": True, "save_every": 4}
    result = fm.distill(hybrid, teacher(), Killing(at), **settings)
    return result.losses, weights(hybrid)


def test_killed_and_resumed_by_another_number_of_processes(tmp_path):
    losses, end = repair(tmp_path / "straight")
    run = fm.Run(tmp_path / "run")
    for at, last in ((8 * 9, 8), (8 * 17, 16)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"): processes(2, repair, run, at)
        paths = run.checkpoints("distill").paths()
        assert paths[-1].name == f"step-{last:08d}.shards"
    resumed, weights_then = repair(run)
    assert [p.name for p in run.checkpoints("distill").paths()] == [f"step-{STEPS:08d}.safetensors"]
    assert far(resumed, losses) < TOL and far(weights_then, end) < TOL
    # and from one process to three
    other = fm.Run(tmp_path / "other")

    class PowerCut(fm.Callback):
        def step(self, event):
            if event["step"] == 9: raise RuntimeError("power cut")
    with pytest.raises(RuntimeError, match="power cut"):
        fm.distill(fm.morph(teacher(), "gdn").commit([1]), teacher(), books(), run=other,
                   save_every=4, callbacks=[PowerCut()], **COMMON)
    processes(4, repair, other)
    assert far([event["loss"] for event in other.log], losses) < TOL


def read_ahead(file, folder, workers, at=None):
    "Stage 3 from a file in shards that workers read ahead, perhaps killed at a step."
    class Cut(fm.Callback):
        def step(self, event):
            if event["step"] == at: os.kill(os.getpid(), signal.SIGKILL)
    _, tokenizer = fm.load_teacher()
    rows = fm.text(tokenizer, file, length=24, shards=4, workers=workers)
    large = teacher(vocab_size=len(tokenizer))
    hybrid = fm.morph(large, "gdn").commit([1])
    result = fm.distill(hybrid, large, rows, run=folder, resume=True, save_every=4,
                        callbacks=[Cut()], **COMMON)
    found = result.losses, weights(hybrid)
    if os.environ.get("RANK", "0") == "0": torch.save(found, folder / "end")


def test_rows_of_workers_ahead_of_sharded_steps(tmp_path):
    "Two processes, killed, then four, killed, then two: as one process without workers."
    file = tmp_path / "docs.jsonl"
    lines = (json.dumps({"text": f"{n}. {Stories(3)[n]}"}) for n in range(40))
    file.write_text("\n".join(lines))
    for name in ("straight", "run"): (tmp_path / name).mkdir()
    read_ahead(file, tmp_path / "straight", 0)
    for world, at in ((2, 7), (4, 14)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            processes(world, read_ahead, file, tmp_path / "run", 1, at)
    processes(2, read_ahead, file, tmp_path / "run", 1)
    ours, theirs = (torch.load(tmp_path / name / "end") for name in ("run", "straight"))
    assert far(ours[0], theirs[0]) < TOL and far(ours[1], theirs[1]) < TOL


def by_name(file, name, folder=None, at=None):
    "Stages 1 and 3 with an optimizer, or one that is killed at row `at` and resumed."
    rows, found = books(), {}
    if folder is None:
        model = fm.morph(teacher(), "gdn")
        result = fm.align(model, rows, start="copy", optimizer=name, **COMMON)
        found["align"] = (result.losses, weights(model))
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    more = {"run": folder, "resume": folder is not None, "save_every": 4}
    result = fm.distill(hybrid, teacher(), Killing(at), optimizer=name, lr=1e-3, **more, **COMMON)
    found["distill"] = (result.losses, weights(hybrid))
    if os.environ.get("RANK", "0") == "0": torch.save(found, file)


# Muon multiplies in bf16, whose numbers are 2^-8 apart: a last bit of a gradient can become that
@pytest.mark.parametrize("name, tolerance", [("adamw-fused", TOL), ("muon", 2.0**-8)])
def test_optimizers_by_name_in_shards(name, tolerance, tmp_path):
    "As in one process; and killed with two processes, resumed by three, then by one."
    by_name(tmp_path / "one", name)
    processes(2, by_name, tmp_path / "two", name)
    one, two = (torch.load(tmp_path / file) for file in ("one", "two"))
    for stage in one:
        assert far(two[stage][0][:3], one[stage][0][:3]) < TOL
        for i in (0, 1): assert far(two[stage][i], one[stage][i]) < tolerance, (stage, i)
    run = tmp_path / "run"
    for world, at in ((2, 8 * 9), (4, 8 * 17)):
        with pytest.raises(ProcessExitedException, match="SIGKILL"):
            processes(world, by_name, tmp_path / "never", name, run, at)
    by_name(tmp_path / "last", name, run)
    last = torch.load(tmp_path / "last")["distill"]
    for i in (0, 1): assert far(last[i], one["distill"][i]) < tolerance


def refused(file):
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    try: fm.distill(hybrid, teacher(), books(), optimizer="adamw-8bit", **COMMON)
    except ValueError as error: (file / os.environ["RANK"]).write_text(str(error))


def test_moments_in_8_bits_are_not_cut(tmp_path):
    processes(2, refused, tmp_path)
    for i in "01": assert "cannot be cut into shards" in (tmp_path / i).read_text()


def note_rows(folder):
    "Write the numbers of the rows that this process computes with."
    from flashmorph.train import distill as chapter
    forward, seen = chapter.NextTokenObjective.forward, []

    def noting(self, batch):
        seen.extend(batch["input_ids"][:, 0].tolist())
        return forward(self, batch)
    chapter.NextTokenObjective.forward = noting
    rows = [{"input_ids": torch.tensor([i, 1, 2, 3])} for i in range(48)]
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    fm.finetune(hybrid, rows, **COMMON | {"steps": 4, "batch_size": 12})
    torch.save(seen, Path(folder) / str(rank()))


def test_each_row_is_computed_by_one_process(tmp_path):
    processes(3, note_rows, tmp_path)
    seen = [torch.load(tmp_path / str(i)) for i in range(3)]
    assert sorted(sum(seen, [])) == list(range(48))
    assert [rows[:3] for rows in seen] == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]


RECIPE = {
    "mixer": "lightning", "budget": 2, "text": {"length": 48},
    "passkeys": {"length": 96, "keys": 1, "words_per_key": 1},
    "align": {"steps": 2, "start_tokens": 500, "optimizer": "adamw"}, "gates": {"steps": 2},
    "distill": {"steps": 2}, "finetune": {"steps": 1, "batch_size": 4},
    "evaluate": {"books": 2, "length": 96, "keys": 1, "words_per_key": 1},
}


def convert_all(folder, **how):
    "Convert as all processes of a launcher do, and note what this one was given to print."
    lines = []
    done = convert(Recipe(**RECIPE), folder / "run", progress=False, say=lines.append, **how)
    (folder / f"lines{os.environ.get('RANK', 0)}").write_text("\n".join(lines))
    assert done["layers"]


def test_all_processes_convert_and_the_first_writes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two): folder.mkdir()
    convert_all(one)
    processes(2, convert_all, two)
    assert (two / "lines1").read_text() == "" != (two / "lines0").read_text()
    names = [sorted(path.name for path in (folder / "run").iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    ours, theirs = (fm.HybridForCausalLM.from_pretrained(x / "run" / "hybrid") for x in (two, one))
    assert ours.config.full_layers == theirs.config.full_layers
    assert far(weights(ours), weights(theirs)) < TOL
    # a finished run is only read, by any number
    processes(2, partial(convert_all, resume=True), two)


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="cannot be shared by 3 processes"): rows_each(8, 1, 3)


def refuse(folder, recipe, **how):
    "Convert as all processes of a launcher do, and note the error."
    with pytest.raises(ValueError) as error: convert(recipe, folder / "run", progress=False, **how)
    (folder / f"error{os.environ.get('RANK')}").write_text(str(error.value))


class PowerCut(fm.Callback):
    def start(self, stage, config, events):
        if stage == "gates": raise KeyboardInterrupt


def test_a_stage_that_cannot_be_shared_is_refused_before_any_is_trained(tmp_path):
    recipe = Recipe(**RECIPE | {"finetune": {"steps": 1, "batch_size": 1, "accumulate": 3}})
    processes(2, refuse, tmp_path, recipe)
    for i in range(2):
        message = (tmp_path / f"error{i}").read_text()
        assert message.startswith("finetune: a step of 3 rows") and "by 2 processes" in message
    assert not (tmp_path / "run").exists()
    # one was fine with the run, and two are refused without a change
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, tmp_path / "run", progress=False, callbacks=[PowerCut()])
    before = sorted((tmp_path / "run").rglob("*"))
    processes(2, partial(refuse, resume=True), tmp_path, None)
    assert sorted((tmp_path / "run").rglob("*")) == before


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}
mixed_precision: bf16
use_cpu: true
num_machines: 1
machine_rank: 0
num_processes: 2
"""


def test_a_launcher_with_a_configuration_of_its_own_makes_the_same_hybrid(tmp_path):
    "`accelerate launch`, whose FSDP and whose precision are not ours, equals one process."
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    save_recipe(Recipe(**RECIPE), tmp_path / "small.toml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launch = ["accelerate.commands.launch", "--config_file", "fsdp.yaml", "--main_process_port",
              port, "-m", "flashmorph"]
    for name, program in (("one", ["flashmorph"]), ("two", launch)):
        command = [sys.executable, "-m", *program, "convert", "small.toml", "--out", name]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("in each of 2 processes" in done.stdout) == (name == "two")
    one, two = (fm.HybridForCausalLM.from_pretrained(tmp_path / x / "hybrid")
                for x in ("one", "two"))
    assert one.config.full_layers == two.config.full_layers
    assert far(weights(two), weights(one)) < TOL


def full_disk(folder, limit):
    "Train where no file may grow beyond `limit` bytes, and note how it ended."
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    hybrid = fm.morph(teacher(), "gdn").commit([1])
    try: fm.finetune(hybrid, books(), run=folder / "run", save_every=2, **COMMON | {"steps": 4})
    except OSError as error: said = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    (folder / str(rank())).write_text(said)


@pytest.mark.parametrize("limit", [8_000, 40_000])
def test_a_full_disk_is_a_sentence_of_every_process(tmp_path, limit):
    processes(2, full_disk, tmp_path, limit)
    for i in range(2):
        said = (tmp_path / str(i)).read_text()
        assert "\n" not in said and said.startswith("could not save") and "step-00000002" in said
        assert said.endswith("free some space and resume.")
    assert not list((tmp_path / "run").rglob("*step-*"))        # no half, which would take space
