"Nothing in a run folder is lost, and nothing goes on that should not."
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import PROGRAM, Stop, save_teacher, small_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from flashmorph.choose.trajectory import GateRun
from flashmorph.folder import Run
from flashmorph.place import old_runs, put_back, take_place
from flashmorph.run import convert as chapter
from flashmorph.run.cli import app
from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe, recipe_toml
from flashmorph.selection import Selection
from flashmorph.train.distill import distill
from flashmorph.train.fit import Callback


@pytest.fixture(scope="module")
def teacher(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module")
def recipe(teacher): return small_recipe(teacher)


@pytest.fixture(scope="module")
def finished_run(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    convert(recipe, folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def stopped_run(recipe, tmp_path_factory):
    "Stopped in stage 3, after two of four steps."
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, folder, progress=False, callbacks=[Stop("distill", 2)])
    return folder


@pytest.fixture
def finished(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "done" / "run")


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return shutil.copytree(stopped_run, tmp_path / "half" / "run")


def contents(folder):
    "All files of a folder, with their bytes."
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def resume(folder, recipe=None, **more):
    return convert(recipe, folder, resume=True, progress=False, **more)


def test_a_resumed_run_is_the_same(stopped, finished_run):
    results = resume(stopped)
    assert results["models"] == json.loads((finished_run / "results.json").read_text())["models"]
    one, two = (load_file(f / "hybrid" / "model.safetensors") for f in (stopped, finished_run))
    assert all(torch.equal(one[name], two[name]) for name in one)


# L1, 24: overwriting

@pytest.mark.parametrize("change", [
    {"budget": 9}, {"teacher": "./nowhere"}, {"text": {"source": "none.txt"}},
    {"passkeys": {"length": 10}}, {"logit_scale": 500.0, "teacher": "./nowhere"},
])
def test_overwrite_checks_first(finished, recipe, change):
    before = contents(finished)
    with pytest.raises(ValueError):
        convert(replace(recipe, **change), finished, overwrite=True, progress=False)
    assert contents(finished) == before and not old_runs(finished)


def test_overwrite_replaces_the_run(finished, recipe):
    results = convert(replace(recipe, budget=1), finished, overwrite=True, progress=False)
    assert results["budget"] == 1 and load_recipe(finished / "recipe.toml").budget == 1
    assert os.listdir(finished.parent) == ["run"]


def test_a_kill_while_overwriting_leaves_the_old_run(finished, recipe, monkeypatch):
    def die(*args): raise SystemExit
    monkeypatch.setattr("flashmorph.run.convert.save_recipe", die)
    with pytest.raises(SystemExit): convert(recipe, finished, overwrite=True, progress=False)
    assert (old_runs(finished)[0] / "results.json").exists()
    with pytest.raises(ValueError, match="was to be overwritten"): resume(finished)
    monkeypatch.undo()
    convert(recipe, finished, progress=False)
    assert os.listdir(finished.parent) == ["run"]


# L2: what is no run is never deleted

def test_a_project_is_no_run(tmp_path, recipe, monkeypatch):
    (tmp_path / "recipe.toml").write_text(recipe_toml(recipe))
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="does not look like a run"):
        convert(recipe, tmp_path, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("inside", ["cwd", "teacher", "notes"])
def test_a_run_with_more_in_it_is_kept(finished, recipe, inside, monkeypatch):
    if inside == "cwd": monkeypatch.chdir(finished)
    if inside == "notes": (finished / "notes.txt").write_text("mine")
    if inside == "teacher":
        shutil.copytree(recipe.teacher, finished / "teacher")
        recipe = replace(recipe, teacher=str(finished / "teacher"))
    before = contents(finished)
    with pytest.raises(ValueError, match="will not be deleted"):
        convert(recipe, finished, overwrite=True, progress=False)
    assert contents(finished) == before


# L5: the hybrid

def test_a_finished_run_is_only_read(finished):
    (finished / "hybrid" / "README.md").write_text("a model card")
    before = contents(finished)
    resume(finished)
    assert contents(finished) == before


def test_files_beside_the_weights_survive(stopped, recipe):
    (stopped / "hybrid").mkdir()
    (stopped / "hybrid" / "README.md").write_text("a model card")
    (stopped / "hybrid" / "config.json").write_text("{}")
    resume(stopped)
    assert (stopped / "hybrid" / "README.md").read_text() == "a model card"
    assert AutoModelForCausalLM.from_pretrained(stopped / "hybrid").config.full_layers


def test_a_kill_between_two_hybrids_loses_none(tmp_path, monkeypatch):
    "The old folder was moved aside, the new one has not come: the old one comes back."
    final = tmp_path / "hybrid"
    new = tmp_path / "new"
    for folder in (final, new): folder.mkdir()
    (final / "README.md").write_text("a model card")
    (new / "weights").write_text("better")
    rename = Path.rename

    def die(path, target):
        if path == new: raise SystemExit
        return rename(path, target)
    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(SystemExit): take_place(new, final)
    monkeypatch.undo()
    assert not final.exists()
    put_back(final)
    assert (final / "README.md").read_text() == "a model card"
    put_back(final)
    assert [path.name for path in tmp_path.iterdir() if path.name != "new"] == ["hybrid"]


# L6: a selection made by hand

def stopped_after_gates(recipe, folder):
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, folder, progress=False, callbacks=[Stop("distill", 1)])
    shutil.rmtree(folder / "checkpoints" / "distill-flashmorph")
    (folder / "results.json").unlink()
    return GateRun.load(folder)


def test_a_selection_by_hand_is_used(recipe, tmp_path):
    gates = stopped_after_gates(recipe, tmp_path / "run")
    others = sorted(set(range(4)) - set(gates.select(2).layers))
    hand = Selection(tuple(others), 4, "hand")
    hand.save(tmp_path / "run")
    said = []
    results = resume(tmp_path / "run", say=said.append)
    assert results["layers"] == others and Selection.load(tmp_path / "run") == hand
    assert any("selection.json" in line for line in said)


def test_a_selection_of_another_size_is_refused(recipe, tmp_path):
    gates = stopped_after_gates(recipe, tmp_path / "run")
    gates.select(3).save(tmp_path / "run")
    with pytest.raises(ValueError, match="keeps 3 of 4 layers.*resume with budget = 3"):
        resume(tmp_path / "run")
    assert resume(tmp_path / "run", replace(recipe, budget=3))["budget"] == 3


def test_layers_that_were_repaired_already_are_not_changed(stopped):
    chosen = Selection.load(stopped)
    others = tuple(sorted(set(range(4)) - set(chosen.layers)))
    Selection(others, 4, "hand").save(stopped)
    with pytest.raises(ValueError, match="layers: .* then, .* now"): resume(stopped)


# S2, 51: two processes

def test_one_process_at_a_time(stopped, recipe):
    code = "import sys, time; from flashmorph.folder import Run\n"
    code += "with Run(sys.argv[1]).lock(): print('locked', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", code, str(stopped)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        before = contents(stopped)
        for more in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=f"in use by process {other.pid}"):
                convert(recipe, stopped, progress=False, **more)
        assert contents(stopped) == before
    finally:
        other.kill()
        other.wait()
    assert resume(stopped)["budget"] == 2             # the lock goes with its process


TRAINING = """
import os, signal, sys, time
import torch
from flashmorph.data.ahead import Ahead
from flashmorph.folder import Run

class Rows:
    def __iter__(self):
        yield {"input_ids": torch.tensor([os.getpid()])}
        time.sleep(60)                              # a document that takes long
    def state_dict(self): return {}

def make(part): return Rows()

with Run(sys.argv[1]).lock():
    rows = iter(Ahead(make, workers=1))
    print(next(rows)["input_ids"].item(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_keeps_no_lock(tmp_path):
    "The worker of a killed training lives on for seconds; the run is free at once."
    run = Run(tmp_path / "run").start()
    command = [sys.executable, "-c", TRAINING, str(run.folder)]
    training = subprocess.Popen(command, text=True, stdout=subprocess.PIPE)
    assert training.stdout
    with training.stdout as said: worker = int(said.readline())
    assert training.wait() == -signal.SIGKILL
    try:
        with run.lock(): pass
    finally: os.kill(worker, signal.SIGKILL)        # an error if it did not live


# S3: what changed outside

@pytest.mark.parametrize("what", ["weights", "rms_norm_eps", "tokenizer"])
def test_another_teacher_is_noticed(recipe, tmp_path, what):
    folder = shutil.copytree(recipe.teacher, tmp_path / "t")
    mine = replace(recipe, teacher=str(folder))
    with pytest.raises(KeyboardInterrupt):
        convert(mine, tmp_path / "run", progress=False, callbacks=[Stop("gates", 1)])
    if what == "tokenizer":
        path = folder / "tokenizer.json"
        text = path.read_text()
        path.write_text(text.replace("▁river", "▁tmp").replace("▁boat", "▁river").replace(
            "▁tmp", "▁boat"))
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        if what == "weights": model.lm_head.weight.data.add_(0.1)
        else: model.config.rms_norm_eps = 1e-3
        model.save_pretrained(folder)
    with pytest.raises(ValueError, match="the tok|the teacher's weights"): resume(tmp_path / "run")


def test_another_text_is_noticed(recipe, tmp_path):
    path = tmp_path / "a.txt"
    lines = [f"Anna went home to river number {i}.\n" for i in range(400)]
    path.write_text("".join(lines))
    mine = replace(recipe, text={"length": 64, "source": str(path)})
    with pytest.raises(KeyboardInterrupt):
        convert(mine, tmp_path / "run", progress=False, callbacks=[Stop("gates", 1)])
    path.write_text("One line more.\n" + path.read_text())
    with pytest.raises(ValueError, match="the text"): resume(tmp_path / "run")


# S4, S11, 21: a changed recipe

@pytest.mark.parametrize("change, stage", [
    ({"align": {"steps": 5}}, "align"), ({"text": {"length": 32}}, "align"),
    ({"passkeys": {"length": 128, "keys": 1, "words_per_key": 2}}, "gates"),
    ({"full_rope": False}, "flashmorph"), ({"logit_scale": 30.0}, "flashmorph"),
    ({"budget": 1}, "flashmorph"), ({"evaluate": {"books": 8}}, "evaluate"),
    ({"distill": {"steps": 4, "batch_size": 2, "lr": 0.5}}, "distill"), ({"seed": 1}, "align"),
])
def test_a_stage_that_has_begun_does_not_change(stopped, recipe, change, stage):
    before = contents(stopped)
    with pytest.raises(ValueError, match=f"{stage}.*would have to be done again"):
        resume(stopped, replace(recipe, **change))
    assert contents(stopped) == before


def test_a_mended_late_setting_goes_on(stopped, recipe):
    mended = replace(recipe, finetune={"steps": 3}, compare=("all_linear",))
    results = resume(stopped, mended)
    assert "all_linear" in results["models"]
    assert len(Run(stopped).log.stage("finetune-flashmorph")) == 3
    assert load_recipe(stopped / "recipe.toml") == mended


def test_a_recipe_edited_in_the_run_is_noticed(stopped, finished):
    for folder in (stopped, finished):
        path = folder / "recipe.toml"
        path.write_text(path.read_text().replace("books = 4", "books = 8"))
        with pytest.raises(ValueError, match="evaluate.books: 4 then, 8 now"): resume(folder)


def test_resume_with_changes_on_the_command_line(stopped):
    def run(*more):
        return CliRunner().invoke(app, ["convert", "--resume", "--out", str(stopped), *more])
    for more, message in ((["--set", "distil.steps=9"], "unknown table"),
                          (["--set", "distill.lr=0.5"], "distill.lr: 0.0001 then, 0.5 now"),
                          (["--overwrite"], "exclude each other")):
        done = run(*more)
        assert done.exit_code == 2 and message in done.output, done.output
        assert done.output.count("\n") == 1
    assert run("--set", "finetune.steps=1").exit_code == 0
    assert load_recipe(stopped / "recipe.toml").finetune.steps == 1


def test_the_demo_resumes_with_the_mixer_of_its_run(stopped):
    done = CliRunner().invoke(app, ["demo", "--resume", "--mixer", "gla", "--out", str(stopped)])
    assert done.exit_code == 2 and "mixer: 'lightning' then, 'gla' now" in done.output
    assert CliRunner().invoke(app, ["demo", "--resume", "--out", str(stopped)]).exit_code == 0


# S6: numbers that are no numbers

def test_a_hybrid_of_nan_is_no_result(recipe, tmp_path, monkeypatch):
    def broken(hybrid, *inputs, **more):
        result = distill(hybrid, *inputs, **more)
        next(hybrid.parameters()).data.fill_(float("nan"))
        return result
    monkeypatch.setattr(chapter, "distill", broken)
    with pytest.raises(FloatingPointError, match="flashmorph after distill"):
        convert(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "hybrid").exists()


# S12: a folder that vanishes

class Vanish(Callback):
    "Removes something from the run in the third step of a stage."
    def __init__(self, path, stage):
        self.path = path
        self.stage = stage

    def step(self, event):
        if (event["stage"], event["step"]) != (self.stage, 3): return
        if self.path.is_dir(): shutil.rmtree(self.path)
        else: self.path.unlink()


@pytest.mark.parametrize("name", [".", "log.jsonl", "run.json"])
@pytest.mark.parametrize("stage", ["align", "gates", "distill-flashmorph"])
def test_a_run_that_vanishes_ends_with_an_error(recipe, tmp_path, name, stage):
    path = tmp_path / "run" / name
    with pytest.raises(OSError, match="moved, deleted or replaced"):
        convert(recipe, tmp_path / "run", progress=False, callbacks=[Vanish(path, stage)])


# Kills at the beginning and the end

def test_a_kill_before_the_recipe_is_written(recipe, tmp_path):
    folder = tmp_path / "run"
    Run(folder).start()
    (folder / ".recipe.toml.0123456789abcdef.partial").write_text("teacher = ")
    with pytest.raises(ValueError, match="nothing to resume"): resume(folder)
    convert(recipe, folder, progress=False)
    assert not list(folder.glob(".*"))


def test_checkpoints_go_when_the_run_is_finished(finished_run, stopped_run):
    assert not (finished_run / "checkpoints").exists()
    assert list((stopped_run / "checkpoints").rglob("*.safetensors"))
    began = time.perf_counter()
    resume(finished_run)
    assert time.perf_counter() - began < 1


def test_a_finished_run_that_lost_its_hybrid_says_so(finished):
    shutil.rmtree(finished / "hybrid")
    with pytest.raises(ValueError, match="its hybrid is gone"): resume(finished)


def test_scores_are_kept_from_the_first_on(stopped):
    "They stand in results.json; those of the first edition, in the log."
    models = json.loads((stopped / "results.json").read_text())["models"]
    assert set(models["teacher"]) >= {"zero_shot"} and "zero_shot" in models["flashmorph"]
    log = Run(stopped).log
    for name, model in models.items():
        stage = f"evaluate-{name}-zero_shot"
        score = {**model["zero_shot"], "recall": 0.125}
        event = {"stage": stage, "step": 0, "seconds": 1.0, "evaluation": score}
        log.append(event)
    (stopped / "results.json").unlink()
    (stopped / "run.json").unlink()                 # as the first edition left it
    results = resume(stopped)
    assert results["models"]["teacher"]["zero_shot"]["recall"] == 0.125
    assert results["seconds"]["evaluate-teacher-zero_shot"] == 1.0


def test_a_run_resumes_from_another_folder(teacher, tmp_path, monkeypatch):
    "38: relative paths of teacher and text."
    shutil.copytree(teacher, tmp_path / "t")
    (tmp_path / "corpus").mkdir()
    lines = [f"Anna went home to river number {i}.\n" for i in range(400)]
    (tmp_path / "corpus" / "a.txt").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe("./t", text={"length": 64, "source": "corpus"})
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, "run", progress=False, callbacks=[Stop("distill", 2)])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert resume(tmp_path / "run")["budget"] == 2


# P3: places and files of another kind

def occupied(tmp_path, place):
    "A path where no run can be."
    (tmp_path / "file").touch()
    if place == "a file": return tmp_path / "file"
    if place == "below a file": return tmp_path / "file" / "run"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    return tmp_path / "link"


@pytest.mark.parametrize("place", ["a file", "below a file", "a link to nowhere"])
@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_place_that_cannot_be_a_run_is_named(recipe, tmp_path, place, more):
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    out = occupied(tmp_path, place)
    before = contents(tmp_path)
    command = ["convert", str(tmp_path / "r.toml"), "--out", str(out), *more]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "400"})
    assert done.exit_code == 2 and "> align" not in done.output
    assert str(tmp_path / "file") in done.output or str(out) in done.output
    assert "[Errno" not in done.output.splitlines()[-1]
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["a folder", "UTF-16", "bytes", "a step in words", "no step"])
@pytest.mark.parametrize("which", ["stopped", "finished"])
def test_a_log_of_another_kind_is_named(request, which, content):
    folder = request.getfixturevalue(which)
    log = folder / "log.jsonl"
    events = log.read_text()
    first = json.loads(events.splitlines()[0])
    if content == "a folder":
        log.unlink()
        log.mkdir()
    if content == "UTF-16": log.write_bytes(events.encode("utf-16"))
    if content == "bytes": log.write_bytes(b"\xff\n" + events.encode())
    if content == "a step in words":
        log.write_text(json.dumps({**first, "step": "one"}) + "\n" + events)
    if content == "no step":
        log.write_text(json.dumps({**first, "step": None}) + "\n" + events)
    if which == "finished":         # a finished run needs no log
        assert resume(folder)["budget"]
        return
    with pytest.raises((ValueError, OSError), match=r"log\.jsonl") as error: resume(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1000, 330_000])
def test_a_full_disk_ends_with_a_line_and_resumes(recipe, tmp_path, limit):
    "No file may be larger than `limit` bytes: first recipe.toml fails, then the report."
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    out = tmp_path / "run"

    def command(*args, **more):
        line = [*PROGRAM, "convert", *map(str, args), "--out", str(out)]
        return subprocess.run(line, text=True, capture_output=True, timeout=200, **more)

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = command(tmp_path / "r.toml", preexec_fn=small_files)
    said = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said.startswith("flashmorph: could not save") and "File too large" in said
    again = command("--resume") if (out / "recipe.toml").exists() else command(tmp_path / "r.toml")
    assert again.returncode == 0, again.stderr
