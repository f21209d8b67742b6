"Bad input gets an error that says what was expected, what came and what to do; and nothing that was computed is lost."
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file
from small import Stop, save_teacher, small_recipe
from typer.testing import CliRunner

from flashmorph.run.cli import app
from flashmorph.store import Checkpoints
from flashmorph.choose.trajectory import GateRun
from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe, recipe_from_dict, recipe_toml
from flashmorph.model.teacher import load_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    "A finished run; copy it before breaking it."
    folder = tmp_path_factory.mktemp("finished") / "run"
    convert(small_recipe(teacher), folder, progress=False)
    return folder


@pytest.mark.parametrize("values, message", [
    ({"mixer": "lightening"}, "did you mean 'lightning'"),
    ({"align": {"step": 3}}, "unknown setting align.step; did you mean 'steps'"),
    ({"aling": {"steps": 3}}, "unknown key 'aling'; did you mean 'align'"),
    ({"gates": {"folder": "x"}}, "unknown setting gates.folder"),
    ({"compare": ["unifrom"]}, "did you mean 'uniform'"),
    ({"seed": "zero"}, "seed: expected an integer"),
    ({"align": 3}, "align: expected a table"),
    ({"budget": {"k": 3}}, "budget: expected a value"),
])
def test_recipe(values, message):
    with pytest.raises(ValueError, match=message): recipe_from_dict(values)


@pytest.mark.parametrize("content, message", [("teacher = ", "is not TOML"), ("[align\nsteps=1", "is not TOML"), (b"\xff\xfe", "is not TOML"),
                                              ('stage = "align"', "unknown key 'stage'")])
def test_recipe_file(tmp_path, content, message):
    (tmp_path / "r.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message): load_recipe(tmp_path / "r.toml")


@pytest.mark.parametrize("change, message", [("align.steps", "expected NAME=VALUE"), ("algin.steps=3", "did you mean 'align'"),
                                             ("align.stpes=3", "did you mean 'steps'"), ("a.b.c=3", "unknown table")])
def test_set(tmp_path, change, message):
    (tmp_path / "r.toml").write_text("budget = 1\n")
    with pytest.raises(ValueError, match=message): load_recipe(tmp_path / "r.toml", [change])


def test_set_and_round_trip(tmp_path):
    (tmp_path / "r.toml").write_text('budget = 1\n[align]\nsteps = 3\n')
    changes = ["align.steps=7", "teacher=some/model", "compare=['uniform']", "gates.align=raw",
               "gates.lam=0.5", "mixer=lightning"]
    recipe = load_recipe(tmp_path / "r.toml", changes)
    assert (recipe.align.steps, recipe.teacher) == (7, "some/model")
    assert (recipe.compare, recipe.gates.lam) == (("uniform",), .5)
    (tmp_path / "s.toml").write_text(recipe_toml(recipe))
    assert load_recipe(tmp_path / "s.toml") == recipe


@pytest.mark.parametrize("budget", [-1, 5, 1.5, "two", True])
def test_budget(teacher, tmp_path, budget):
    with pytest.raises(ValueError, match="budget: expected"):
        convert(small_recipe(teacher, budget=budget), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()          # nothing was begun


def test_teacher_missing(tmp_path):
    for name in (tmp_path / "nowhere", "./nowhere"):
        with pytest.raises(ValueError, match="expected a folder with config.json"): load_teacher(name)


def test_teacher_of_an_unsupported_family(tmp_path):
    from flashmorph.run.pretrain import build_tokenizer
    from transformers import BloomConfig, BloomForCausalLM
    tokenizer = build_tokenizer()
    BloomForCausalLM(BloomConfig(vocab_size=len(tokenizer), hidden_size=16, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="qwen3"): load_teacher(tmp_path)


def test_no_room_for_the_template(teacher, tmp_path):
    recipe = small_recipe(teacher, passkeys=dict(length=64, keys=4, words_per_key=4))
    with pytest.raises(ValueError, match="the shortest possible length is"): convert(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_empty_text(teacher, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="the file is empty"):
        convert(small_recipe(teacher, text=dict(source=str(tmp_path / "empty.txt"), length=64)), tmp_path / "run", progress=False)


def test_run_folder_exists(teacher, finished, tmp_path):
    before = (finished / "results.json").read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty"): convert(small_recipe(teacher), finished, progress=False)
    assert (finished / "results.json").read_bytes() == before
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(ValueError, match="does not look like a run"): convert(small_recipe(teacher), tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "thesis.tex").read_text() == "ten years of work"
    with pytest.raises(ValueError, match="nothing to resume"): convert(None, tmp_path, resume=True, progress=False)
    with pytest.raises(ValueError, match="another recipe"): convert(small_recipe(teacher, seed=1), finished, resume=True, progress=False)


def test_command_line_errors_are_one_line(finished, tmp_path):
    for args in (["convert", str(tmp_path / "no.toml")], ["select", str(tmp_path), "--budget", "1"],
                 ["select", str(finished), "--budget", "1", "--method", "flash"],
                 ["evaluate", str(tmp_path / "nowhere")], ["convert", "--out", str(tmp_path / "new")], ["demo", "--out", str(finished)]):
        out = CliRunner().invoke(app, args)
        assert out.exit_code == 2 and out.output.startswith("flashmorph: ") and out.output.count("\n") == 1, out.output


@pytest.fixture(scope="module")
def stopped(teacher, tmp_path_factory):
    "A run that was stopped in its last stage, with the checkpoints of all stages."
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        convert(small_recipe(teacher), folder, progress=False, callbacks=[Stop("finetune", 1)])
    return folder


def broken_run(stopped, tmp_path, stage: str):
    "A copy of the stopped run, and the checkpoint of one of its stages."
    folder = shutil.copytree(stopped, tmp_path / "run")
    return folder, Checkpoints(folder / "checkpoints" / stage).paths()[-1]


def test_truncated_checkpoint(stopped, tmp_path):
    folder, path = broken_run(stopped, tmp_path, "align")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="may be truncated"): convert(None, folder, resume=True, progress=False)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="may be truncated"): convert(None, folder, resume=True, progress=False)


def test_foreign_checkpoint(stopped, tmp_path):
    folder, path = broken_run(stopped, tmp_path, "distill-flashmorph")
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not written by flashmorph"): convert(None, folder, resume=True, progress=False)
    shutil.copy(Checkpoints(folder / "checkpoints" / "gates").paths()[-1], path)
    with pytest.raises(ValueError, match="belongs to other settings"): convert(None, folder, resume=True, progress=False)


def test_gates_file(finished, tmp_path):
    (tmp_path / "gates.json").write_text('{"gates": [1]}')
    with pytest.raises(ValueError, match="is not a gate run"): GateRun.load(tmp_path)


def test_disk_full(tmp_path):
    "A real failed write: files may not grow past a limit. The checkpoint from before survives, and no debris stays."
    checkpoints = Checkpoints(tmp_path)
    first = checkpoints.save(1, {"x": torch.zeros(10)}, {})
    before = first.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="What was there before is untouched"): checkpoints.save(2, {"x": torch.zeros(10**6)}, {})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == [first.name] and first.read_bytes() == before
    assert Checkpoints.read(checkpoints.save(2, {"x": torch.zeros(10**6)}, {}))[1]["step"] == 2
