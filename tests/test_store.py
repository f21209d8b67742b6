"A run folder: nothing planted, damaged, lost or shared goes unnoticed."
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small import save_teacher
from torch import nn

from flashmorph.choose.gates import train_gates
from flashmorph.choose.trajectory import GateRun
from flashmorph.data.passkeys import passkeys
from flashmorph.data.text import text
from flashmorph.folder import Run
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_teacher
from flashmorph.selection import Ranking, Selection
from flashmorph.store import Checkpoints, Damaged, EventLog, read_json, write_aside
from flashmorph.train.align import align
from flashmorph.train.distill import finetune
from flashmorph.train.fit import fit
from flashmorph.train.objective import Callback, FitConfig, Objective

FEW = FitConfig(steps=6, batch_size=2, save_every=2)


class Slope(Objective):
    "Fits y = w x."
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.unit = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, batch): return (self.w * batch["x"] - 2 * batch["x"]).pow(2).mean(), {}


ROWS = [{"x": torch.tensor(float(i % 3 + 1))} for i in range(7)]


def slope(run=None, objective=None, config=FEW, **options):
    objective = objective or Slope()
    options = {"data": ROWS, "stage": "demo", "run": run, "progress": False, **options}
    return fit(objective, config=config, **options)


class At(Callback):
    "Does something after a step."
    def __init__(self, step, do): self.at, self.do = step, do

    def step(self, event):
        if event["step"] == self.at: self.do()


def stopped(run, at=4, **options):
    "A run that was interrupted after step `at`."
    interrupt = At(at, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): slope(run, callbacks=[interrupt], **options)


# Planted links (L9)

def test_a_planted_partial_file_is_not_written_through(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr("secrets.token_hex", lambda n: "known")     # even if the name were known
    for name in (".log.jsonl.partial", ".note.known.partial"): (run / name).symlink_to(outside)
    with pytest.raises(OSError, match="could not save"):
        write_aside(run / "note", lambda p: p.write_text("new"))
    assert outside.read_text() == "mine" and not (run / "note").exists()


def test_links_in_a_run_lead_nowhere(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/demo").symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the run"): slope(tmp_path / "run")
    (tmp_path / "run/checkpoints/demo").unlink()
    (tmp_path / "run/log.jsonl").symlink_to(tmp_path / "log")
    with pytest.raises(OSError, match="could not write"): slope(tmp_path / "run")
    assert not any(outside.iterdir()) and not (tmp_path / "log").exists()


@pytest.mark.parametrize("stage", ["../../x", "a/b", "", "..", ".x", 3])
def test_names_of_stages_are_plain(tmp_path, stage):
    "S20"
    with pytest.raises(ValueError, match="expected a name"): slope(tmp_path / "run", stage=stage)
    assert not (tmp_path / "run").exists()


# Two processes (S2)

def test_a_second_process_is_told_who_holds_the_run(tmp_path):
    code = "from test_store import slope; import sys; slope(sys.argv[1])"
    here = os.path.dirname(__file__)

    def second():
        return subprocess.run([sys.executable, "-c", code, tmp_path], cwd=here, text=True,
                              capture_output=True)

    answers = []
    slope(tmp_path, callbacks=[At(3, lambda: answers.append(second()))])
    assert f"is in use by process {os.getpid()} on" in answers[0].stderr
    assert [event["step"] for event in EventLog(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert second().returncode == 0                                 # the lock is free again


# Logs (S1, T3, L7, S12)

def break_log(path, how):
    lines = path.read_bytes().splitlines(keepends=True)
    changed = {
        "deleted": [], "first lost": lines[1:], "middle lost": lines[:1] + lines[2:],
        "twice": lines[:2] + lines[1:], "order": [lines[1], lines[0], *lines[2:]],
        "edited": [lines[0].replace(b'"loss": ', b'"loss": 1'), *lines[1:]],
        "number": [b"7\n", *lines], "null": [b"null\n", *lines], "mark": [b"\xef\xbb\xbf", *lines],
        "no stage": [b'{"step": 1}\n', *lines], "deep": [b"[" * 10**5 + b"\n", *lines],
        "cut": [lines[0][:9] + b"\n", *lines[1:]],
    }
    path.write_bytes(b"".join(changed[how]))


UNFIT = ["deleted", "first lost", "middle lost", "twice", "order", "edited"]


@pytest.mark.parametrize("how", UNFIT)
@pytest.mark.parametrize("finished", [True, False])
def test_a_log_that_does_not_fit_is_refused(tmp_path, how, finished):
    slope(tmp_path) if finished else stopped(tmp_path)
    break_log(tmp_path / "log.jsonl", how)
    before = (tmp_path / "log.jsonl").read_bytes()
    with pytest.raises(ValueError, match="does not fit the checkpoint"):
        slope(tmp_path, resume=True)
    assert (tmp_path / "log.jsonl").read_bytes() == before


@pytest.mark.parametrize("how", ["number", "null", "mark", "no stage", "deep", "cut"])
def test_a_line_that_is_no_event_is_named(tmp_path, how):
    stopped(tmp_path)
    break_log(tmp_path / "log.jsonl", how)
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: no event"):
        slope(tmp_path, resume=True)


def test_a_cut_last_line_is_forgiven(tmp_path):
    straight = slope(tmp_path / "a").losses
    stopped(tmp_path / "b")
    with open(tmp_path / "b/log.jsonl", "ab") as file: file.write(b'{"stage": "demo", "st')
    assert slope(tmp_path / "b", resume=True).losses == straight
    steps = [event["step"] for event in EventLog(tmp_path / "b/log.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["log.jsonl", ""])
@pytest.mark.parametrize("step", [3, 6])
def test_what_vanishes_under_a_run_stops_the_run(tmp_path, what, step):
    run = tmp_path / "run"
    path = run / what
    vanish = At(step, lambda: path.unlink() if what else shutil.rmtree(run))
    with pytest.raises(OSError, match="deleted"): slope(run, callbacks=[vanish])
    assert not path.exists()


# Checkpoints (S14, L8, T7)

def test_every_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = Checkpoints(tmp_path).save(3, {"model.w": torch.randn(5)}, {"settings": {"lr": 1e-3}})
    whole = path.read_bytes()
    rng = np.random.default_rng()
    for at in rng.choice(len(whole), 200, replace=False):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.integers(8)]) + whole[at + 1:])
        try: tensors, meta = Checkpoints.read(path)
        except ValueError: continue
        # blanks that fill up the header may change
        assert whole[at:at + 1] == b" ", at
        assert meta == {"settings": {"lr": 1e-3}, "step": 3} and list(tensors) == ["model.w"]


def test_a_position_of_any_length_fits(tmp_path):
    "The header of a safetensors file ends at 100 MB; a position may be longer."
    rest = [123_456] * 13_000_000
    path = Checkpoints(tmp_path).save(1, {}, {"data": {"rest": rest}})
    assert Checkpoints.read(path)[1]["data"]["rest"] == rest


def test_checkpoints_of_the_first_edition_load(tmp_path):
    slope(tmp_path)
    path = Run(tmp_path).checkpoints("demo").paths()[0]
    tensors, meta = Checkpoints.read(path)
    old = {key: meta[key] for key in ("step", "tokens", "seconds", "data")}
    old["settings"] = {key: meta["settings"][key] for key in ("stage", "steps", "lr", "betas")}
    save_file(tensors, path, metadata={"flashmorph": json.dumps(old)})
    objective = Slope()
    assert slope(tmp_path, objective, resume=True).steps == 6
    assert torch.equal(objective.w.detach(), tensors["model.w"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path):
    path = Checkpoints(tmp_path).save(1, {}, {})
    path.chmod(0)
    with pytest.raises(ValueError, match="Permission denied") as error: Checkpoints.read(path)
    assert not isinstance(error.value, Damaged) and "elete" not in str(error.value)


def test_no_checkpoint_stays_after_a_killed_clean_up(tmp_path):
    slope(tmp_path)
    checkpoints = Run(tmp_path).checkpoints("demo")
    shutil.copy(checkpoints.paths()[0], checkpoints.folder / "step-00000004.safetensors")
    (checkpoints.folder / ".step-00000006.safetensors.0123.partial").touch()
    slope(tmp_path, resume=True)
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step-00000006.safetensors"]
    with safe_open(checkpoints.paths()[0], "pt") as file:
        assert sorted(file.keys()) == ["flashmorph.meta", "model.w"]        # weights only


# What two halves of a training share (S3, S6)

def test_other_frozen_weights_data_or_facts_are_refused(tmp_path):
    class Data(list):
        name = "a"
        def fingerprint(self): return self.name

    data = Data(ROWS)
    stopped(tmp_path, data=data, facts={"teacher": "one"})
    other = Slope()
    other.unit.data += 1
    same = {"data": data, "facts": {"teacher": "one"}, "resume": True}
    with pytest.raises(ValueError, match="frozen weights: '"): slope(tmp_path, other, **same)
    with pytest.raises(ValueError, match="teacher: 'one' then, 'two' now"):
        slope(tmp_path, **{**same, "facts": {"teacher": "two"}})
    data.name = "b"
    with pytest.raises(ValueError, match="data: 'a' then, 'b' now"): slope(tmp_path, **same)
    data.name = "a"
    assert slope(tmp_path, **same).losses == slope(data=data).losses


def test_a_last_step_that_is_not_finite_is_refused(tmp_path):
    class Broken(Slope):
        def project(self):
            self.w.data.fill_(float("nan"))
            return {}

    with pytest.raises(FloatingPointError, match="w is not finite"):
        slope(tmp_path, Broken(), FitConfig(steps=1, batch_size=2))
    assert not Run(tmp_path).checkpoints("demo").paths()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_the_last_step_counts(tmp_path, number):
    "S13: what was computed is saved, and the caller is interrupted."
    interrupt = At(6, lambda: os.kill(os.getpid(), number))
    with pytest.raises(KeyboardInterrupt): slope(tmp_path, callbacks=[interrupt])
    assert Checkpoints.read(Run(tmp_path).checkpoints("demo").paths()[-1])[1]["step"] == 6


def test_watchers_hear_how_a_training_ended():
    "35"
    class Watch(Callback):
        def __init__(self): self.heard = []
        def end(self, result): self.heard.append("end")
        def stop(self, reason): self.heard.append(reason.split(":")[0])

    def fail(): raise RuntimeError("lost")

    watch = Watch()
    slope(callbacks=[watch])
    with pytest.raises(RuntimeError): slope(callbacks=[watch, At(2, fail)])
    stopped_at = At(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt): slope(callbacks=[watch, stopped_at])
    assert watch.heard == ["end", "RuntimeError", "KeyboardInterrupt"]


# Files of the search (T4, S14, L7)

CONTENTS = ["null", "[1]", '"x"', "[" * 10**5, "{", '{"layers": null}', '{"trajectory": [[1], 2]}',
            '{"trajectory": [], "losses": [], "settings": {}}',
            '{"trajectory": [[NaN]], "losses": [], "settings": {}}',
            '{"trajectory": [[2]], "losses": [], "settings": {}}',
            '{"trajectory": [[[1]]], "losses": [], "settings": {}}',
            '{"trajectory": [[1]], "losses": 3, "settings": {}}']


@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
@pytest.mark.parametrize("kind, name", [(GateRun, "gates.json"), (Selection, "selection.json")])
def test_a_file_of_another_shape_is_one_error(tmp_path, kind, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="is not a ") as error: kind.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_selection_checks_its_fields():
    good = {"layers": (0, 1), "num_layers": 4, "method": "m"}
    wrong = [{"num_layers": 4.5}, {"num_layers": True}, {"method": 3}, {"scores": (1, 2)},
             {"scores": [float("nan")] * 4}, {"digest": 3}, {"layers": (0, 0)}, {"layers": "01"}]
    for change in wrong:
        with pytest.raises(ValueError): Selection(**{**good, **change})
    for gates in ([[float("nan")] * 2], [[1.5] * 2], None, torch.ones(0, 2)):
        with pytest.raises(ValueError, match="trajectory"): GateRun(gates)


def test_integers_of_numpy_and_torch():
    "32"
    scores = np.array([0.1, 0.9, 0.3, 0.8])
    first = Selection(tuple(np.argsort(-scores)[:2]), np.int64(4), "mine", scores)
    second = Selection(torch.tensor(scores).topk(2).indices, 4, "mine", torch.tensor(scores))
    assert first == second and first.layers == (1, 3)
    ranking = Ranking("mine", np.argsort(-scores), scores)
    assert ranking.select(np.int32(2), full=[np.argmin(scores)]).layers == (0, 1)
    assert json.dumps(ranking.order) == "[1, 3, 2, 0]"


def test_gates_go_on_bit_for_bit(tmp_path):
    "What the optimizer of gates keeps survives a checkpoint to the last bit, wherever it is cut."
    teacher, tokenizer = load_teacher(save_teacher(tmp_path / "teacher"))
    books = {"length": 96, "keys": 2, "words_per_key": 2}
    options = {"steps": 40, "batch_size": 2, "save_every": 1, "progress": False, "resume": True}

    def gates(run, **more):
        model = morph(teacher)
        return train_gates(model, passkeys(tokenizer, **books), run=run, **options, **more)

    whole = gates(tmp_path / "whole").trajectory
    for step in (13, 20, 26, 34):
        run = tmp_path / f"cut-{step}"
        interrupt = At(step, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt): gates(run, callbacks=[interrupt])
        assert torch.equal(gates(run).trajectory, whole), step


def test_a_longer_gate_training_is_not_written_over(tmp_path):
    teacher, tokenizer = load_teacher()
    model, task = morph(teacher), {"length": 128, "keys": 2, "words_per_key": 2}
    options = {"run": tmp_path, "batch_size": 1, "progress": False}
    train_gates(model, passkeys(tokenizer, **task), steps=2, **options)
    before = (tmp_path / "gates.json").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="holds 2 steps, more than the 1"):
        train_gates(model, passkeys(tokenizer, **task), steps=1, resume=True, **options)
    assert (tmp_path / "gates.json").read_bytes() == before


# Rows (T8, 40, 47)

IDS = torch.arange(8)
WRONG_ROWS = {
    "without input_ids": {"x": IDS}, "lists": [1, 2], "floats": {"input_ids": IDS / 2},
    "ids above the vocabulary": {"input_ids": IDS + 10**6}, "negative ids": {"input_ids": IDS - 3},
    "2-d": {"input_ids": IDS.reshape(2, 4)}, "empty": {"input_ids": IDS[:0]},
    "padding alone": {"input_ids": IDS, "attention_mask": 0 * IDS},
    "another mask": {"input_ids": IDS, "attention_mask": IDS[:3]}, "text": "once upon a time",
}


@pytest.fixture(scope="module")
def model():
    return morph(load_teacher()[0])


@pytest.mark.parametrize("row", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_of_another_kind_are_named(model, row):
    once = {"steps": 1, "batch_size": 1, "progress": False}
    hybrid = model.commit([0])
    for stage in (lambda: align(model, [row], **once), lambda: train_gates(model, [row], **once),
                  lambda: finetune(hybrid, [row], **once)):
        with pytest.raises(ValueError, match="row|token|input_ids|attention_mask|padding"): stage()


def test_models_and_data_of_another_kind(model):
    teacher, _ = load_teacher()
    with pytest.raises(TypeError, match="a morphable model"): align(teacher, ROWS, steps=1)
    with pytest.raises(TypeError, match="stream of rows, got int"): slope(data=3)
    short = [{"input_ids": IDS}, {"input_ids": IDS[:5]}]
    with pytest.raises(ValueError, match="'input_ids' has the shapes"):
        align(model, short, steps=1, batch_size=2, progress=False)


def test_accumulated_answers_weigh_as_in_one_batch(model):
    "40, with answers and padding: loss and gradient of 1 x 3 rows and of 3 x 1 row."
    tokenizer = load_teacher()[1]
    rows = [next(iter(text(tokenizer, length=40, seed=seed))) for seed in range(3)]
    for length, row in zip((40, 7, 21), rows):
        row["attention_mask"] = (torch.arange(40) < length).long()
        row["answers"] = (torch.arange(40) % 5 == length % 2).long()
    once = {"steps": 1, "lr": 1e-9, "clip": None, "answer_weight": 3.0, "progress": False}
    hybrid = model.commit([0, 5])
    one = finetune(hybrid, rows, batch_size=3, **once).events[0]
    three = finetune(hybrid, rows, batch_size=1, accumulate=3, **once).events[0]
    for key in ("loss", "grad_norm"): assert three[key] == pytest.approx(one[key], rel=1e-4)


def test_what_was_frozen_stays_frozen(model):
    "47: also afterwards. A model that is frozen as a whole trains as a whole."
    hybrid = model.commit([0])
    rows = [{"input_ids": IDS}]
    trains = [name for name, _ in hybrid.named_parameters() if ".mlp." in name]
    for name, p in hybrid.named_parameters(): p.requires_grad_(name in trains)
    before = {name: p.detach().clone() for name, p in hybrid.named_parameters()}
    finetune(hybrid, rows, steps=2, lr=1e-2, progress=False)
    after = dict(hybrid.named_parameters())
    assert [name for name in before if not torch.equal(before[name], after[name])] == trains
    assert [name for name, p in after.items() if p.requires_grad] == trains
    hybrid.requires_grad_(False)
    finetune(hybrid, rows, steps=1, lr=1e-2, progress=False)
    assert not any(p.requires_grad for p in hybrid.parameters())
    assert not any(torch.equal(before[name], p) for name, p in hybrid.named_parameters())


def test_json_that_is_none_names_the_file(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="x.json is not a thing"): read_json(path, "a thing")


# What a training takes

class Costs(Callback):
    "What the watchers hear after each step."
    def __init__(self): self.heard = []

    def spent(self, so_far): self.heard.append((so_far.steps, so_far.peak_memory))


def test_peak_memory_is_the_highest_of_all_parts(tmp_path):
    "A block of 400 MB counts while it is there, and in the resumed training too."
    class Large(Slope):
        def forward(self, batch):
            block = torch.ones(100 * 2**20, device=batch["x"].device)
            return super().forward(batch)[0] + 0 * block[0], {}

    small = slope().peak_memory
    stopped(tmp_path, objective=Large())
    resumed = slope(tmp_path, resume=True)
    assert resumed.peak_memory > small + 3e8
    # a finished training is loaded, with its peak
    assert slope(tmp_path, resume=True).peak_memory == resumed.peak_memory


def test_checkpoints_without_peak_memory_load(tmp_path):
    stopped(tmp_path)
    path = Run(tmp_path).checkpoints("demo").paths()[-1]
    tensors, meta = Checkpoints.read(path)
    del meta["peak_memory"]
    path.unlink()
    Run(tmp_path).checkpoints("demo").save(meta.pop("step"), tensors, meta)
    assert slope(tmp_path, resume=True).peak_memory > 0


def test_watchers_hear_what_is_spent():
    costs = Costs()
    slope(callbacks=[costs])
    assert [step for step, _ in costs.heard] == [1, 2, 3, 4, 5, 6]
    peaks = [peak for _, peak in costs.heard]
    assert peaks == sorted(peaks) and peaks[0] > 0
