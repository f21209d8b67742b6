"The command line: any terminal, any folder name, one line for every error."
import io
import json
import os
import shlex
import signal
import subprocess
import time

import pytest
import torch
from rich.console import Console
from small import PROGRAM, save_teacher, small_recipe
from typer.testing import CliRunner

from flashmorph.choose.trajectory import GateRun
from flashmorph.folder import Run
from flashmorph.measure import speed
from flashmorph.run import bench as gate_bench
from flashmorph.run import cli
from flashmorph.run.recipe import save_recipe
from flashmorph.scores import Comparison, ModelScores, Score
from flashmorph.selection import Selection
from flashmorph.show.table import ComparisonTable

def run(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="flashmorph")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_terminal_without_blocks(tmp_path, encoding):
    "33: the layers are saved and printed all the same."
    GateRun(torch.rand(3, 6)).save(tmp_path)
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    command = [*PROGRAM, "select", str(tmp_path), "--budget", "2", "--save"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 6 layers" in done.stdout, done.stderr
    assert done.stdout.count("#") == 2 and Selection.load(tmp_path).budget == 2


@pytest.mark.parametrize("width", [72, 60, 40, 24])
def test_scores_are_whole_on_narrow_terminals(width):
    "34"
    values = {"recall": 0.893, "exact": 0.5625, "answer_nll": 0.514, "lm_nll": 1.18}
    scores = {name: Score(value, value - .1, value + .1) for name, value in values.items()}
    models = tuple(ModelScores(name, {}, scores) for name in ("teacher", "a/folder/of/a/hybrid"))
    console = Console(width=width, file=io.StringIO())
    console.print(ComparisonTable(Comparison(models, {})))
    shown = console.file.getvalue()
    assert "…" not in shown
    for value in values.values():
        for number in (value, value - .1, value + .1): assert shown.count(f"{number:.4f}") == 2


def test_folder_names_are_no_markup(tmp_path):
    "T6"
    folder = save_teacher(tmp_path / "[/bold] [red]")
    sizes = ["--length", 128, "--keys", 2, "--words-per-key", 2, "--books", 1]
    done = run("evaluate", folder, *sizes)
    assert done.exit_code == 0, done.output
    joined = "".join(done.output.split())
    assert "[/bold][red]" in joined and "answer_nll" in joined
    assert "> [/x]" in run_shown("[/x]")


def run_shown(line):
    console = Console(file=io.StringIO())
    cli.show(f"> {line}", console)
    return console.file.getvalue()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: "
                 "can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
])
def test_out_of_memory_is_one_line_with_advice(monkeypatch, error):
    "T10"
    def fail(*args, **more): raise error
    monkeypatch.setattr("flashmorph.run.recipe.load_recipe", fail)
    done = run("convert", "r.toml", "--out", "my run")
    assert done.exit_code == 2 and done.output.count("\n") == 1, done.output
    assert "lower batch_size or length" in done.output and "--out 'my run'" in done.output


def test_other_failures_of_programs_are_not_hidden(monkeypatch):
    def fail(*args, **more): raise RuntimeError("a defect")
    monkeypatch.setattr("flashmorph.run.recipe.load_recipe", fail)
    assert isinstance(run("convert", "r.toml").exception, RuntimeError)


@pytest.mark.parametrize("args", [
    ["bench", "ops", "--device", "nope"], ["bench", "gates", "--device", "nope"],
    ["bench", "ops", "--repeats", 0], ["bench", "gates", "--steps", 0],
    ["bench", "gates", "--batch-size", 0], ["bench", "ops", "--lengths", "512,0"],
    ["bench", "ops", "--lengths", "1k"], ["bench", "ops", "--dtype", "float8"],
    ["bench", "ops", "--heads", -1], ["bench", "ops", "--ops", "lightening"], ["bench"],
    ["select", "x", "--budget", "three"], ["select", "x"], ["slect"], ["convert", "--no-such"],
    ["evaluate", "bundled", "--books", 0], ["evaluate", "bundled", "--batch-size", 0],
    ["convert", "a.toml", "b.toml"], ["convert", "--resume", "--overwrite", "--out", "x"],
])
def test_errors_are_one_line(args):
    "T9, 23, P1"
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert done.output.startswith("flashmorph: ") and done.output.count("\n") == 1, done.output


def test_the_first_paragraph_of_a_message_is_enough(monkeypatch):
    "P2"
    def fail(*args, **more): raise OSError("no such model:\n  abc\n\nIf this is a private one ...")
    monkeypatch.setattr("flashmorph.run.recipe.load_recipe", fail)
    assert run("convert", "r.toml").output == "flashmorph: no such model: abc\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_hint_after_a_stop_can_be_pasted(tmp_path, number):
    "37, and a stop by a scheduler."
    out = tmp_path / "my runs" / "run 1"
    long = {"steps": 3000, "batch_size": 2, "start_tokens": 300}
    save_recipe(small_recipe(save_teacher(tmp_path / "t"), align=long), tmp_path / "r.toml")
    command = [*PROGRAM, "convert", str(tmp_path / "r.toml"), "--out", str(out)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **quiet)
    try:
        end = time.monotonic() + 100
        while len(Run(out).log.stage("align")) < 3 and time.monotonic() < end: time.sleep(0.05)
        process.send_signal(number)
        said = process.communicate(timeout=60)[1].strip().splitlines()[-1]
    finally: process.kill()
    assert process.returncode == 130, said
    words = shlex.split(said.split("go on with: ")[1])
    assert words == ["flashmorph", "convert", "--resume", "--out", str(out)]


@pytest.mark.parametrize("what", ["prefill", "decode"])
def test_an_interrupted_bench_leaves_its_rows(what, tmp_path, monkeypatch):
    measure = getattr(speed, f"{what}_rows")

    def rows(race, length):
        if length > 32: raise KeyboardInterrupt
        return measure(race, length)

    monkeypatch.setattr(speed, f"{what}_rows", rows)
    file = tmp_path / "speed.json"
    asked = ["bench", what, "--model", "tiny", "--lengths", "32,64", "--json", file]
    done = run(*asked, "--set", "rounds=1", "--set", "steps=2")
    assert done.exit_code == 130
    found = json.loads(file.read_text())
    assert found["unfinished"] and {row["tokens"] for row in found["rows"]} == {32}


def test_an_interrupted_bench_of_gates_leaves_its_rounds(tmp_path, monkeypatch):
    times = iter([1.0] * 3)

    def timed(call, cuda):
        for seconds in times: return seconds
        raise KeyboardInterrupt

    monkeypatch.setattr(gate_bench, "timed", timed)
    monkeypatch.setattr(gate_bench, "peak_bytes", lambda call, cuda: 0)
    file = tmp_path / "gates.json"
    done = run("bench", "gates", "--steps", 1, "--json", file)
    found = json.loads(file.read_text())
    assert done.exit_code == 130 and found["unfinished"]
    assert [row["ms"] for row in found["rows"]] == [1000.0] * 3
