"Stages with an optimizer chosen by name: resumed exactly, in float32, refused in time."
import sys

import pytest
import torch
from small import Stop, save_teacher, small_recipe

import flashmorph as fm
from flashmorph.run.convert import convert
from flashmorph.run.recipe import Recipe
from flashmorph.train.distill import DistillConfig

NAMES = ["adamw", "adamw-fused", "muon"]


@pytest.fixture(scope="module")
def place(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def train(stage, place, name, folder=None, dtype=torch.float32, **known):
    "The weights after a few steps of a stage, and the losses."
    teacher, tokenizer = fm.load_teacher(place)
    model = fm.morph(teacher.to(dtype))
    settings = {"steps": 5, "batch_size": 2, "lr": 1e-3, "optimizer": name, "progress": False}
    settings |= {"run": folder, **known}
    rows = fm.text(tokenizer, length=32)
    torch.manual_seed(1)
    if stage == "align":
        result = fm.align(model, rows, start="copy", **settings)
        return result.losses, {k: p for k, p in model.named_parameters() if ".linear." in k}
    hybrid = model.commit([1, 3])
    if stage == "distill": result = fm.distill(hybrid, teacher, rows, **settings)
    else: result = fm.finetune(hybrid, rows, **settings)
    return result.losses, dict(hybrid.named_parameters())


@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_training_goes_on_bit_for_bit(stage, name, place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(stage, place, name, tmp_path / "run", callbacks=[Stop(stage, 3)])
    losses, ours = train(stage, place, name, tmp_path / "run", resume=True)
    straight, theirs = train(stage, place, name)
    assert losses == straight and all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_optimizers_differ_and_fused_does_not(place):
    weights = {}
    for name in NAMES: weights[name] = train("distill", place, name)[1]
    def apart(a, b): return max((a[k] - b[k]).abs().max().item() for k in a)
    assert apart(weights["adamw"], weights["adamw-fused"]) < 1e-5
    assert apart(weights["adamw"], weights["muon"]) > 1e-4
    assert apart(weights["adamw"], train("distill", place, DistillConfig().optimizer)[1]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_in_16_bits_has_masters_in_32(name, place, tmp_path):
    losses, weights = train("distill", place, name, tmp_path / "run", torch.bfloat16,
                            save_every=1, keep=9)
    assert all(p.dtype == torch.float32 for p in weights.values())
    paths = fm.Run(tmp_path / "run").checkpoints("distill").paths()
    assert losses[-1] < losses[0] and paths


def test_another_optimizer_is_another_training(place, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train("distill", place, "adamw", tmp_path / "run", callbacks=[Stop("distill", 3)])
    with pytest.raises(ValueError, match="optimizer: 'adamw' then, 'muon' now"):
        train("distill", place, "muon", tmp_path / "run", resume=True)


def test_torchao_is_asked_for_before_anything_is_spent(place, tmp_path, monkeypatch):
    for name in ("torchao", "torchao.optim"): monkeypatch.setitem(sys.modules, name, None)
    words = "finetune.optimizer: 'adamw-8bit' needs torchao .*; pip install torchao"
    finetune = {"steps": 1, "optimizer": "adamw-8bit"}
    with pytest.raises(ValueError, match=words):
        convert(small_recipe(place, finetune=finetune), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=words): train("finetune", place, "adamw-8bit")
    with pytest.raises(ValueError, match="distill.optimizer: expected one of 'adamw'"):
        Recipe(distill={"optimizer": "lion"})
    with pytest.raises(ValueError, match="unknown setting gates.optimizer"):
        Recipe(gates={"optimizer": "adamw"})
