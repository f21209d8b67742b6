"What a stage writes of itself: tokens and time left, and a warning if its loss goes astray."
import re
import time

import pytest
import torch
from small import Stop, save_teacher

import flashmorph as fm
from flashmorph.train.fit import fit
from flashmorph.train.objective import FitConfig, Objective


@pytest.fixture(scope="module")
def place(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def train(place, stage="distill", **settings):
    teacher, tokenizer = fm.load_teacher(place)
    model, rows = fm.morph(teacher), fm.text(tokenizer, length=32)
    if stage == "align": return fm.align(model, rows, batch_size=2, **settings)
    hybrid = model.commit([1, 3])
    return fm.distill(hybrid, teacher, rows, batch_size=2, **settings)


class Slow(fm.Callback):
    "Steps that are slow enough for the bar to be drawn."
    def step(self, event): time.sleep(0.15)


def test_a_stage_says_its_tokens_and_the_time_left(place, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        train(place, steps=6, run=tmp_path, callbacks=[Slow(), Stop("distill", 3)])
    out = capsys.readouterr()
    said = "distill: 384 tokens in 6 steps, about .* left; elsewhere KL began at"
    assert len(re.findall(said, out.out)) == 1 and "left=" in out.err and "warning" not in out.out
    # resumed: the tokens of the whole stage
    train(place, steps=6, run=tmp_path, resume=True)
    assert len(re.findall(said, capsys.readouterr().out)) == 1
    train(place, steps=6, progress=False)
    assert capsys.readouterr().out == ""


class Following(Objective):
    "The squared distance of a number, which hardly moves, from those of the rows."
    def __init__(self):
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch): return (batch["x"] - self.number).pow(2).mean(), {}


@pytest.mark.parametrize("rises", [True, False])
def test_a_loss_that_rises_is_warned_of_once(rises, capsys):
    rows = [{"x": torch.tensor(float(i if rises else -i))} for i in range(60)]
    if not rises: rows = rows[::-1]
    config = FitConfig(steps=60, batch_size=1, lr=1e-9)
    fit(Following(), rows, config, stage="demo")
    out = capsys.readouterr().out
    assert out.count("warning: demo: the loss rises") == rises and "demo: 60 steps, about" in out


def test_branches_that_are_worse_than_none_are_warned_of(place, capsys):
    settings = {"start": "copy", "optimizer": "adamw", "lr": 1e-9, "lr_end": None}
    result = train(place, "align", steps=40, **settings)
    found = capsys.readouterr().out.count("worse than branches that answer nothing")
    assert min(result.losses) > 1 and found == 1
