"A run that is killed in every stage and resumed ends bit-identical to one that was left alone."
import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import PROGRAM, events, save_teacher, small_recipe

from flashmorph.store import EventLog
from flashmorph.run.recipe import recipe_toml

STEPS = 40
STAGES = ("align", "gates", "distill-flashmorph", "finetune-flashmorph")


def start(*args: str) -> subprocess.Popen:
    command = [*PROGRAM, "convert", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0, out
    return out


def hit(process: subprocess.Popen, log: EventLog, stage: str, step: int, number: int) -> None:
    "Send `number` to `process` once `stage` has taken `step` steps."
    deadline = time.monotonic() + 120
    while not any(e["step"] >= step for e in log.stage(stage)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{stage} never reached step {step}"
        time.sleep(0.002)
    process.send_signal(number)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    few = {"steps": STEPS, "batch_size": 2, "save_every": 3}
    align = {**few, "start_tokens": 300}
    made = small_recipe(save_teacher(folder / "teacher"), align=align, gates=few, distill=few,
                        finetune={**few, "batch_size": 1})
    (folder / "recipe.toml").write_text(recipe_toml(made))
    return folder / "recipe.toml"


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> Path:
    "The run that is left alone."
    out = tmp_path_factory.mktemp("straight") / "run"
    finish(start(recipe, "--out", out))
    return out


def read(path: Path) -> dict: return json.loads(path.read_text())


def same(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "hybrid" / "model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert read(a / "gates.json")["trajectory"] == read(b / "gates.json")["trajectory"]
    assert read(a / "results.json")["models"] == read(b / "results.json")["models"]
    assert events(a) == events(b)


def test_killed_in_every_stage(recipe, straight, tmp_path):
    seed = int.from_bytes(os.urandom(4))
    print("moments drawn with seed", seed)
    rng, out = random.Random(seed), tmp_path / "run"
    process = start(recipe, "--out", out)
    for stage in STAGES:
        hit(process, EventLog(out / "log.jsonl"), stage, rng.randint(1, STEPS - 8), signal.SIGKILL)
        time.sleep(rng.random() * 0.01)
        assert process.wait(60) == -signal.SIGKILL
        process = start("--resume", "--out", out)
    finish(process)
    same(straight, out)


def test_asked_to_stop(recipe, straight, tmp_path):
    "Ctrl-C (or SIGTERM) lets the step end, saves it, says how to go on and exits with 130."
    out = tmp_path / "run"
    process = start(recipe, "--out", out)
    for number, stage in ((signal.SIGINT, "align"), (signal.SIGTERM, "gates")):
        hit(process, EventLog(out / "log.jsonl"), stage, 7, number)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130 and "--resume" in said, said
        saved = [int(p.stem[5:]) for p in (out / "checkpoints" / stage).glob("step-*")]
        # nothing was lost
        assert max(saved) == max(e["step"] for e in EventLog(out / "log.jsonl").stage(stage))
        process = start("--resume", "--out", out)
    finish(process)
    same(straight, out)
