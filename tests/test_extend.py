"More steps for a training that has begun: the same as all at once, or a reason why not."
import pytest
import torch
from small import Stop, events, save_teacher, small_recipe
from typer.testing import CliRunner

import flashmorph as fm
from flashmorph.run import cli
from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe, save_recipe
from flashmorph.store import read_json
from flashmorph.train.objective import FitConfig

LONG = {"align": {"lr": 1e-3, "lr_end": None, "warmup": 2, "start": "copy"},
        "muon": {"lr": 1e-3, "lr_end": None, "warmup": 2, "start_tokens": 100},
        "gates": {"align": "raw", "lr": 2e-2}, "distill": {"lr_end": None}, "finetune": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def train(stage, place, folder, steps, resume=False, callbacks=(), workers=0, **more):
    "One stage from its start, or resumed; the weights that it trains, by name."
    teacher, tokenizer = fm.load_teacher(place)
    model = fm.morph(teacher)
    settings = {"steps": steps, "batch_size": 2, **LONG[stage], **more}
    known = {"run": folder, "resume": resume, "callbacks": callbacks}
    rows = fm.text(tokenizer, length=32, shards=2, workers=workers)
    books = fm.passkeys(tokenizer, length=96, keys=1, words_per_key=2)
    torch.manual_seed(1)
    if stage in ("align", "muon"):
        if stage == "align": settings["optimizer"] = "adamw"
        fm.align(model, rows, **known, **settings)
        return dict(model.named_parameters())
    if stage == "gates":
        fm.train_gates(model, books, **known, **settings)
        return {"gates": model.gates}
    hybrid = model.commit([1, 3])
    if stage == "distill": fm.distill(hybrid, teacher, rows, **known, **settings)
    else: fm.finetune(hybrid, books, **known, **settings)
    return dict(hybrid.named_parameters())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("stage", LONG)
def test_more_steps_equal_all_at_once(stage, place, tmp_path, capsys):
    "Bit for bit, twice; the log is the same, too."
    train(stage, place, tmp_path / "grown", 2, extendable=True)
    assert "at once" not in capsys.readouterr().out
    for steps in (3, 5):
        ours = train(stage, place, tmp_path / "grown", steps, resume=True, extendable=True)
        out = capsys.readouterr().out
        assert f" to {steps}, begun" in out and f": the same as {steps} at once" in out
    assert same(ours, train(stage, place, tmp_path / "once", 5))
    assert events(tmp_path / "grown") == events(tmp_path / "once")


def test_workers_read_on_for_more_steps(place, tmp_path):
    "Rows made ahead of the steps that were asked for are not lost: as all at once, without any."
    for steps, workers in ((2, 2), (5, 1), (7, 2)):
        ours = train("distill", place, tmp_path / "grown", steps, resume=steps > 2,
                     extendable=True, workers=workers)
    assert same(ours, train("distill", place, tmp_path / "once", 7))


def test_a_stopped_training_may_get_more_steps(place, tmp_path):
    "It has its optimizer anyway."
    with pytest.raises(KeyboardInterrupt):
        train("distill", place, tmp_path / "run", 4, callbacks=[Stop("distill", 2)])
    ours = train("distill", place, tmp_path / "run", 6, resume=True)
    assert same(ours, train("distill", place, tmp_path / "once", 6))


def test_a_falling_rate_is_told(place, tmp_path, capsys):
    falls = {"lr": 1e-3, "lr_end": 1e-5, "extendable": True}
    train("distill", place, tmp_path / "run", 3, **falls)
    train("distill", place, tmp_path / "run", 6, resume=True, **falls)
    out = capsys.readouterr().out
    assert "distill goes on from step 3 to 6, begun with 3 steps: not the same as 6" in out
    config = FitConfig(steps=6, lr=1e-3, lr_end=1e-5)
    assert f"(it was 1e-05 last, and goes on with {config.lr_at(3):.3g})" in out
    rates = [event["lr"] for event in events(tmp_path / "run")]
    assert rates[2:] == [1e-5, *(config.lr_at(i) for i in (3, 4, 5))]


def test_the_warm_up_stays_as_it_was(place, tmp_path, capsys):
    "Left out it follows from the steps, and those that were taken are not taken again."
    left_out = {"warmup": None, "extendable": True}
    train("align", place, tmp_path / "run", 10, **left_out)
    train("align", place, tmp_path / "run", 20, resume=True, **left_out)
    assert "not the same as 20 at once" in capsys.readouterr().out
    assert {event["lr"] for event in events(tmp_path / "run")} == {1e-3}
    # and a finished one is only loaded
    train("align", place, tmp_path / "run", 20, resume=True, **left_out)
    assert "goes on" not in capsys.readouterr().out


@pytest.mark.parametrize("changes, words", [
    ({"steps": 2}, "steps: 3 then, 2 now"),
    ({"steps": 5, "lr": 2e-4}, "lr: 0.0001 then, 0.0002 now"),
    ({"steps": 5, "batch_size": 1}, "batch_size: 2 then, 1 now"),
    ({"steps": 5, "seed": 1}, "seed: 0 then, 1 now"),
])
def test_anything_else_is_refused_by_name(place, tmp_path, changes, words):
    train("distill", place, tmp_path / "run", 3, extendable=True)
    before = events(tmp_path / "run")
    changed = {"extendable": True, **changes}
    steps = changed.pop("steps")
    with pytest.raises(ValueError, match=words):
        train("distill", place, tmp_path / "run", steps, resume=True, **changed)
    assert events(tmp_path / "run") == before


def test_no_more_steps_without_an_optimizer_or_along_a_path(place, tmp_path):
    train("distill", place, tmp_path / "run", 3)
    for _ in range(2):
        with pytest.raises(ValueError, match="distill.steps: 3 then, 4 now.* kept no state of its"):
            train("distill", place, tmp_path / "run", 4, resume=True, extendable=True)
    path = {"align": "answers", "lr": 0.1, "extendable": True}
    train("gates", place, tmp_path / "path", 3, **path)
    with pytest.raises(ValueError, match="gates.steps: 3 then, 4 now: .* falls to its end"):
        train("gates", place, tmp_path / "path", 4, resume=True, **path)


def longer(place, folder, changes, recipe=None):
    "`convert --resume --set ...`, or a conversion from the start of the `recipe`."
    if recipe is not None:
        convert(recipe, folder, progress=False)
        return None
    asked = ["convert", "--resume", "--out", str(folder)]
    for change in changes: asked += ["--set", change]
    return CliRunner().invoke(cli.app, asked, prog_name="flashmorph", env={"COLUMNS": "300"})


def recipe_of(place, steps, table="distill", **more):
    table_of = {"steps": steps, "batch_size": 2, "lr_end": None, "extendable": True}
    left_out = {name: {"steps": 0} for name in ("finetune",)}
    return small_recipe(place, **{**left_out, table: table_of, **more})


def test_a_finished_run_goes_on(place, tmp_path):
    "By tokens, on the command line; the hybrid and its scores are those of all steps at once."
    longer(place, tmp_path / "run", [], recipe_of(place, 2, compare=("uniform",)))
    longer(place, tmp_path / "once", [], recipe_of(place, 5, compare=("uniform",)))
    done = longer(place, tmp_path / "run", ["distill.tokens=640"])      # 5 steps of 2 rows of 64
    assert done.exit_code == 0, done.output
    for name in ("flashmorph", "uniform"):
        assert f"distill-{name} goes on from step 2 to 5" in done.output
    ours, theirs = (fm.load_model(tmp_path / name / "hybrid")[0] for name in ("run", "once"))
    assert same(dict(ours.named_parameters()), dict(theirs.named_parameters()))
    found, expected = (read_json(tmp_path / name / "results.json", "results")["models"]
                       for name in ("run", "once"))
    assert found == expected
    assert trained(tmp_path / "run") == trained(tmp_path / "once")
    # finished again, and known as such
    again = longer(place, tmp_path / "run", [])
    assert again.exit_code == 0 and "goes on" not in again.output


def trained(folder):
    "The events of the trainings, stage by stage: one that goes on comes after later stages."
    found = [event for event in events(folder) if "loss" in event]
    return sorted(found, key=lambda event: (event["stage"], event["step"]))


def test_a_killed_extension_goes_on(place, tmp_path):
    longer(place, tmp_path / "run", [], recipe_of(place, 2))
    longer(place, tmp_path / "once", [], recipe_of(place, 6))
    more = load_recipe(tmp_path / "run/recipe.toml", ["distill.steps=6", "distill.save_every=1"])
    with pytest.raises(KeyboardInterrupt):
        convert(more, tmp_path / "run", resume=True, callbacks=[Stop("distill", 4)], progress=False)
    convert(None, tmp_path / "run", resume=True, progress=False)
    ours, theirs = (fm.load_model(tmp_path / name / "hybrid")[0] for name in ("run", "once"))
    assert same(dict(ours.named_parameters()), dict(theirs.named_parameters()))


def test_a_finished_run_refuses_by_name(place, tmp_path):
    "And is as it was afterwards."
    longer(place, tmp_path / "run", [], recipe_of(place, 3))
    longer(place, tmp_path / "small", [], recipe_of(place, 3, distill={"steps": 3}))
    assert not (tmp_path / "small/checkpoints").exists()
    for folder, changes, words in (
        ("run", ["distill.steps=2"], "distill.steps: 3 then, 2 now"),
        ("run", ["distill.steps=5", "distill.lr=0.5"], "distill.lr"),
        ("run", ["align.steps=9"], "(align.steps: 4 then, 9 now)"),
        ("run", ["distill.steps=5", "align.steps=9"], "align.steps: 4 then, 9 now"),
        ("run", ["distill.steps=5", "distill.text.length=32"],
         "the rows of distill: no table of their own then, "),
        ("run", ["distill.text.length=32"], "distill.text.source: [] then, ['stories'] now"),
        ("run", ["text.source=nowhere.txt"], "text.source: ['stories'] then, ['nowhere.txt'] now"),
        ("run", ["teacher=bundled"], f"teacher: ['{place}'] then, ['bundled'] now"),
        ("small", ["distill.steps=5"], "kept no checkpoint to go on from"),
        ("small", ["align.steps=9"], "only its last training, distill, can get more steps"),
    ):
        before = (tmp_path / folder / "log.jsonl").read_bytes()
        recipe = (tmp_path / folder / "recipe.toml").read_bytes()
        done = longer(place, tmp_path / folder, changes)
        assert done.exit_code == 2 and words in done.output, done.output
        assert len(done.output.splitlines()) == 1
        assert (tmp_path / folder / "log.jsonl").read_bytes() == before
        assert (tmp_path / folder / "recipe.toml").read_bytes() == recipe
    assert longer(place, tmp_path / "run", []).exit_code == 0


@pytest.mark.parametrize("begun, then", [((), "distill.text.length=32"),
                                         (("distill.text.length=32",), "distill.text.length=64")])
def test_rows_of_a_stage_that_has_begun_stay(begun, then, place, tmp_path):
    "With a table of their own or not. A refused change leaves the run as it was."
    recipe = recipe_of(place, 4, distill={"steps": 4, "save_every": 1, "batch_size": 2})
    save_recipe(recipe, tmp_path / "recipe.toml")
    recipe = load_recipe(tmp_path / "recipe.toml", list(begun))
    with pytest.raises(KeyboardInterrupt):
        convert(recipe, tmp_path / "run", callbacks=[Stop("distill", 2)], progress=False)
    before = (tmp_path / "run/recipe.toml").read_bytes()
    done = longer(place, tmp_path / "run", [then])
    assert done.exit_code == 2, done.output
    named = "distill.text.length: 32 then, 64 now" if begun else "the rows of distill: no table"
    assert named in done.output, done.output
    assert (tmp_path / "run/recipe.toml").read_bytes() == before
    done = longer(place, tmp_path / "run", [])
    assert done.exit_code == 0, done.output
