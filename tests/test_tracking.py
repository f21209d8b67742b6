"Trackers by name: what they hold of a conversion is what the run's log holds, without a network."
import os
import socket
import sys

import pytest
from small import Stop, events, save_teacher, small_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

import flashmorph as fm
from flashmorph.run import cli
from flashmorph.run.convert import convert
from flashmorph.train import tracking

STAGES = ("align", "gates", "distill-flashmorph", "finetune-flashmorph")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    "A conversion that was stopped in stage 2 and resumed, while nothing can be reached."
    folder = tmp_path_factory.mktemp("tracked")
    assert "trackio" not in sys.modules             # it reads the variable when it is imported
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    reached = []

    def connect(self, address): reached.append(address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        # save each step, so that the resumed part is not the whole
        gates = {"steps": 4, "batch_size": 2, "save_every": 1}
        recipe = small_recipe(save_teacher(folder / "teacher"), gates=gates)
        trackers = fm.Tracking(["tensorboard", "trackio"], folder / "mine")
        with pytest.raises(KeyboardInterrupt):
            convert(recipe, folder / "mine", callbacks=[trackers, Stop("gates", 2)])
        trackers = fm.Tracking(["tensorboard", "trackio"], folder / "mine")
        results = convert(None, folder / "mine", resume=True, callbacks=[trackers])
    assert not reached
    return folder / "mine", results


def logged(folder, stage):
    return [event for event in events(folder) if event["stage"] == stage]


def board(folder, stage):
    path = str(folder / "tensorboard" / stage)
    found = EventAccumulator(path, size_guidance={"scalars": 0, "histograms": 0}).Reload()
    tags = found.Tags()
    scalars = {tag: {x.step: x.value for x in found.Scalars(tag)} for tag in tags["scalars"]}
    return scalars, {tag: found.Histograms(tag) for tag in tags["histograms"]}


@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard_holds_every_loss(converted, stage):
    folder, _ = converted
    scalars, histograms = board(folder, stage)
    known = {event["step"]: event for event in logged(folder, stage)}
    for name in ("loss", "lr", "grad_norm"):
        told = {step: event[name] for step, event in known.items() if name in event}
        assert len(told) >= 2 and scalars[name] == pytest.approx(told, rel=1e-6)
    assert scalars["tokens_s"] and min(scalars["tokens_s"].values()) > 0
    assert list(histograms) == (["gates"] if stage == "gates" else [])


def test_tensorboard_holds_the_gates(converted):
    folder, _ = converted
    scalars, histograms = board(folder, "gates")
    told = logged(folder, "gates")
    assert len(told) == 4
    for layer in range(4):
        gates = {event["step"]: event["gates"][layer] for event in told}
        assert scalars[f"gates/{layer:02}"] == pytest.approx(gates, rel=1e-6)
    for event, drawn in zip(told, histograms["gates"], strict=True):
        assert drawn.step == event["step"] and drawn.histogram_value.num == 4
        assert drawn.histogram_value.sum == pytest.approx(sum(event["gates"]))


@pytest.mark.parametrize("stage", STAGES)
def test_trackio_holds_every_loss_the_gates_and_the_settings(converted, stage):
    import trackio
    folder, _ = converted
    runs = [run for run in trackio.Api().runs("mine") if run.name == stage]
    # the newest of stage 2 is the resumed one; it is whole
    assert len(runs) == (2 if stage == "gates" else 1)
    newest = max(runs, key=lambda run: run.config["_Created"])
    rows = trackio.SQLiteStorage.get_logs("mine", stage, run_id=newest.id)
    known = logged(folder, stage)
    assert [row["step"] for row in rows] == [event["step"] for event in known]
    for row, event in zip(rows, known, strict=True):
        assert row["loss"] == event["loss"]
        gates = event.get("gates", [])
        assert [row[f"gates/{i:02}"] for i in range(len(gates))] == gates
        if gates: assert sum(row["gates"]["values"]) == len(gates)
    assert newest.config["stage"] == stage and newest.config["batch_size"] == known_batch(stage)


def known_batch(stage): return 1 if stage.startswith("finetune") else 2


def test_the_selection_and_the_scores_are_there(converted):
    import trackio
    folder, results = converted
    (run,) = [run for run in trackio.Api().runs("mine") if run.name == "results"]
    assert run.config["layers"] == str(results["layers"]) and run.config["budget"] == 2
    scalars, _ = board(folder, "results")
    (row,) = trackio.SQLiteStorage.get_logs("mine", "results", run_id=run.id)
    for model, when in (("teacher", "zero_shot"), ("flashmorph", "finetuned")):
        score = results["models"][model][when]["recall"]
        assert row[f"{model}/{when}/recall"] == score
        assert scalars[f"{model}/{when}/recall"] == {0: pytest.approx(score)}


def test_a_finished_run_writes_nothing_more(converted):
    folder, _ = converted
    before = sorted((folder / "tensorboard").rglob("*"))
    convert(None, folder, resume=True, callbacks=[fm.Tracking("tensorboard", folder)])
    assert sorted((folder / "tensorboard").rglob("*")) == before


def test_trackers_that_are_not_there_are_named_before_anything_starts(tmp_path, monkeypatch):
    "With the package to install, in a line."
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    for name, words in (("wandb", "pip install wandb"), ("tensorbord", "did you mean")):
        asked = ["demo", "--out", str(tmp_path / "run"), "--track", name]
        done = CliRunner().invoke(cli.app, asked, prog_name="flashmorph")
        assert done.exit_code == 2 and words in done.output, done.output
        assert len(done.output.splitlines()) == 1 and not (tmp_path / "run").exists()


def test_the_command_tracks(tmp_path):
    from flashmorph.run.recipe import save_recipe
    save_recipe(small_recipe(save_teacher(tmp_path / "teacher")), tmp_path / "recipe.toml")
    asked = ["convert", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run"),
             "--track", "tensorboard"]
    done = CliRunner().invoke(cli.app, asked, prog_name="flashmorph")
    assert done.exit_code == 0, done.output
    assert {path.name for path in (tmp_path / "run/tensorboard").iterdir()} == {*STAGES, "results"}
