"""A small conversion, killed before its file operations and resumed, ends as one left alone.

An audit hook counts what the process does to files in the run folder, and kills the process
before operation number `n`: what a power cut leaves. The conversion is the command line's own."""
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import events, save_teacher, small_recipe

from flashmorph.run.recipe import recipe_toml

KILLED = """
import os, signal, sys
folder, last, count = sys.argv[1], int(sys.argv[2]), 0
WATCHED = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
def watch(event, arguments):
    global count
    if event not in WATCHED or not str(arguments[0]).startswith(folder): return
    if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR): return
    count += 1
    if count == last: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
from flashmorph.run.cli import app
try: app(sys.argv[3:])
finally: print("operations:", count)
"""


def run(out: Path, last: int, *args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", KILLED, str(out), str(last), "convert", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--out", str(out)], env=env, text=True, capture_output=True,
                          timeout=300)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("recipe")
    few = {"steps": 3, "batch_size": 1, "save_every": 2}
    align = {**few, "start_tokens": 300}
    made = small_recipe(save_teacher(folder / "teacher"), align=align, gates=few, distill=few,
                        finetune=few, evaluate={"books": 1})
    (folder / "recipe.toml").write_text(recipe_toml(made), encoding="utf-8")
    return str(folder / "recipe.toml")


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory) -> tuple[Path, int]:
    "The run that is left alone, and how many file operations it took."
    out = tmp_path_factory.mktemp("straight") / "run"
    done = run(out, 0, recipe)
    assert done.returncode == 0, done.stderr
    return out, int(done.stdout.split("operations:")[1])


def killed_and_resumed(recipe: str, out: Path, last: int) -> None:
    killed = run(out, last, recipe)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    # killed before the recipe was written: nothing was begun, and the same command begins
    arguments = ["--resume"] if (out / "recipe.toml").exists() else [recipe]
    done = run(out, 0, *arguments)
    assert done.returncode == 0, done.stderr


def same(a: Path, b: Path) -> None:
    one, two = (load_file(folder / "hybrid/model.safetensors") for folder in (a, b))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    for name in ("gates.json", "results.json", "selection.json"):
        first, second = (json.loads((folder / name).read_text()) for folder in (a, b))
        for key in ("trajectory", "models", "layers"): assert first.get(key) == second.get(key)
    assert events(a) == events(b)
    names = [{p.relative_to(f).as_posix() for p in f.rglob("*")} for f in (a, b)]
    assert names[0] == names[1]


def test_killed_before_a_few_operations(recipe, straight, tmp_path):
    left_alone, operations = straight
    seed = int.from_bytes(os.urandom(4))
    print("operations drawn with seed", seed)
    for last in random.Random(seed).sample(range(1, operations + 1), 3):
        out = tmp_path / str(last)
        killed_and_resumed(recipe, out, last)
        same(left_alone, out)


@pytest.mark.slow
@pytest.mark.skipif("ALL_KILLS" not in os.environ, reason="long; set ALL_KILLS=1 to run it")
def test_killed_before_every_operation(recipe, straight, tmp_path):
    left_alone, operations = straight
    for last in range(1, operations + 1):
        out = tmp_path / str(last)
        killed_and_resumed(recipe, out, last)
        same(left_alone, out)
