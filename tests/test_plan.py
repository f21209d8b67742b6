"What a conversion takes at least, counted before it runs."
import re
from unittest import mock

import pytest
import torch
from rich.console import Console
from small import save_teacher, small_recipe
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from flashmorph.choose.ablate import AnswerDivergence
from flashmorph.choose.gates import AnswerObjective, PriceObjective
from flashmorph.measure import machines
from flashmorph.measure import plan as planning
from flashmorph.measure.cost import CostModel, count_weights, meta_model, visible_pairs
from flashmorph.measure.machines import Machine
from flashmorph.measure.plan import plan
from flashmorph.measure.spend import Passes, answering
from flashmorph.model import logits
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_teacher
from flashmorph.run import cli
from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe, save_recipe, shipped_recipes
from flashmorph.run.terminal import console
from flashmorph.train.align import AlignConfig, AlignObjective
from flashmorph.train.distill import DistillObjective, NextTokenObjective
from flashmorph.train.least_squares import least_squares
from flashmorph.train.optimizers import make_optimizer

T = 96


@pytest.fixture(scope="module", params=["qwen3", "llama", "phi3"])
def teacher(request, tmp_path_factory):
    folder = save_teacher(tmp_path_factory.mktemp("teacher") / "t", request.param)
    return load_teacher(folder, attn_implementation="eager")[0]


@pytest.fixture
def batch():
    ids = torch.randint(5, 60, (2, T))
    answers = torch.zeros_like(ids)
    answers[:, 20:30] = 1
    return {"input_ids": ids, "answers": answers}


def taken(objective, batch) -> int:
    with FlopCounterMode(display=False) as counter: objective(batch)[0].backward()
    return counter.get_total_flops()


def hidden_pairs(model) -> int:
    "FLOPs that eager attention spends on pairs that the mask hides, in a layer and a row."
    dims = model.dims[0]
    pair = 2 * dims.num_heads * (dims.head_dim + dims.value_dim)
    return pair * (T**2 - visible_pairs(T, None))


@pytest.mark.parametrize("mixer", ["lightning", "lightning(expand_kv=True)", "gdn"])
def test_each_stage_takes_what_is_counted(teacher, batch, mixer, monkeypatch):
    "Two rows of every stage, against PyTorch's own count of a step."
    counted = CostModel(teacher.config, mixer)
    passes, unseen = Passes(counted, T), hidden_pairs(counted)
    model = morph(teacher, mixer)
    L = model.num_layers
    assert taken(AlignObjective(model), batch) == 2 * (passes.align() + L * unseen)
    # a step of the optimizer; keys and values that are no longer shared are more than is planned
    objective = AlignObjective(model)
    objective(batch)[0].backward()
    optimizer = objective.optimizer(objective.trainable().values(), AlignConfig(lr=0.01))
    with FlopCounterMode(display=False) as counter: optimizer.step()
    if "expand_kv" in mixer: assert counter.get_total_flops() > passes.muon
    else: assert counter.get_total_flops() == passes.muon
    model.zero_grad()
    # teacher and mix, and twice behind the first layer
    expected = 2 * (passes.gates() + (2 * L + 2 * (L - 1)) * unseen)
    assert taken(PriceObjective(model, align="raw"), batch) == expected
    # the answers: through the last MLP too, and logits of ten tokens forward, forward and back
    more = 2 * (passes.rest // L + 3 * 10 * passes.head)
    assert taken(AnswerObjective(model), batch) == expected + more
    hybrid = model.commit([0, 2])
    for again in (False, True):
        if again: monkeypatch.setattr(logits, "LOGITS", 10 * teacher.config.vocab_size)
        found = taken(DistillObjective(hybrid, teacher), batch)
        assert found == 2 * (passes.distill([0, 2], again) + (L + 6) * unseen)
        found = taken(NextTokenObjective(hybrid), batch)
        assert found == 2 * (passes.finetune([0, 2], again) + 6 * unseen)


def test_the_exchange_takes_what_is_counted(teacher, batch):
    "Two sets and the teacher, without shared blocks; a book of ten answers."
    counted = CostModel(teacher.config, "lightning")
    passes, unseen, L = Passes(counted, T), hidden_pairs(counted), counted.num_layers
    books = [{name: x[0] for name, x in batch.items()}]
    with FlopCounterMode(display=False) as counter:
        far = AnswerDivergence(morph(teacher, "lightning"), books, 1, share=False)
    spent = counter.get_total_flops()       # the digest and the check of blocks are in there
    assert spent >= passes.teacher + L * unseen
    with FlopCounterMode(display=False) as counter: far.many([{0}, {L - 1}])
    assert counter.get_total_flops() == 2 * (answering(passes, 1, 10) + unseen)


def test_the_start_takes_what_is_counted(teacher, batch):
    "Solving is left out of the plan, and PyTorch counts its products only."
    model = morph(teacher, "lightning")
    counted = CostModel(teacher.config, "lightning")
    passes = Passes(counted, T)
    rows = {"input_ids": batch["input_ids"]}
    with FlopCounterMode(display=False) as counter:
        least_squares(model, iter([rows, rows]), 4 * T)
    products = 4 * (passes.start() + model.num_layers * hidden_pairs(counted))
    assert products <= counter.get_total_flops() < 1.5 * products


def test_a_plan_spends_nothing(tmp_path, monkeypatch):
    "No weights are read, no text, and no folder is made."
    teacher = save_teacher(tmp_path / "teacher")
    for file in teacher.glob("*.safetensors"): file.unlink()
    save_recipe(small_recipe(teacher, compare=("uniform",)), tmp_path / "recipe.toml")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "ceilings", lambda dtype, device: {"flops": 1e9})
    asked = ["convert", "recipe.toml", "--plan", "--set", "align.steps=1000"]
    done = CliRunner().invoke(cli.app, asked, prog_name="flashmorph")
    assert done.exit_code == 0, done.output
    for words in ("align", "gates", "distill uniform", "finetune", "128K", "at least"):
        assert words in done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_no_plan_without_a_teacher(tmp_path):
    save_recipe(small_recipe(tmp_path / "none"), tmp_path / "recipe.toml")
    asked = ["convert", str(tmp_path / "recipe.toml"), "--plan"]
    done = CliRunner().invoke(cli.app, asked, prog_name="flashmorph")
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert "config.json" in done.output


def test_a_plan_follows_its_recipe(tmp_path):
    "Twice the steps take twice the FLOPs; a stage without steps takes nothing."
    recipe = small_recipe(save_teacher(tmp_path / "teacher"), compare=("all_linear", "uniform"))
    stages = {stage.stage: stage for stage in plan(recipe, rate=1e9).stages}
    twice = small_recipe(recipe.teacher, gates={"steps": 8, "batch_size": 2})
    double = {stage.stage: stage for stage in plan(twice, rate=1e9).stages}["gates"]
    assert double.flops == 2 * stages["gates"].flops and double.tokens == 2 * 4 * 2 * 128
    assert double.seconds == double.flops / 1e9
    ours = stages["distill-flashmorph"]
    assert ours.flops == stages["distill-uniform"].flops
    assert ours.memory < stages["distill-all_linear"].memory
    idle = small_recipe(recipe.teacher, align={"steps": 0, "start": "copy"})
    assert plan(idle, rate=1e9).stages[0].row()[3] == ""
    for wrong in ("recipe.toml", {"align": {}}):
        with pytest.raises(TypeError, match="expected a recipe"): plan(wrong, rate=1e9)
    with pytest.raises(ValueError, match="rate"): plan(recipe, rate=0)
    with pytest.raises(ValueError, match="budget"): plan(small_recipe(recipe.teacher, budget=99))


def planned(*args):
    command = ["plan", *map(str, args)]
    # 130 columns, whatever the environment says of the terminal
    with mock.patch.multiple(console, _width=130, _height=50, no_color=True):
        return CliRunner().invoke(cli.app, command, prog_name="flashmorph")


@pytest.mark.parametrize("name, total", [
    ("qwen3-0.6b", 596e6), ("qwen3-1.7b", 1.72e9), ("qwen3-8b", 8.19e9), ("qwen3-30b-a3b", 30.5e9),
    ("smollm2-135m", 134.5e6)])
def test_teachers_of_shipped_recipes_have_the_right_size(name, total):
    "The parameters of their model cards, from facts that come with the package."
    config = planning.teacher_config(load_recipe(name).teacher)
    assert abs(count_weights(meta_model(config)).parameters / total - 1) < 0.005


def test_a_shipped_recipe_has_a_plan_without_weights_or_network():
    machine = Machine("h100", 4, 0.5)
    made = plan(load_recipe("smollm2-135m"), machine=machine)
    align, gates, exchange, distill, finetune = made.stages
    assert gates.parts.gradients == gates.parts.optimizer == 0 and align.parts.logits == 0
    # at least 4 + 4 + 8 bytes for each weight of the hybrid, divided by four
    for stage in (distill, finetune):
        held = stage.parts
        assert held.weights + held.gradients + held.optimizer > 16 * 134.5e6 / 4
        assert stage.memory == held.total() > held.weights + held.optimizer
        assert stage.seconds == stage.flops / (4 * 0.5 * 989e12)
    # every process measures all of it, with a whole model
    assert exchange.seconds == exchange.flops / (0.5 * 989e12)
    assert exchange.parts.weights > 4 * gates.parts.weights * 0.99


def test_the_command_plans_and_warns():
    done = planned("smollm2-135m-cheap", "--gpu", "l40s", "--set", "distill.batch_size=8192")
    assert done.exit_code == 0, done.output
    assert "hours of l40s" in " ".join(done.output.split()) and "60.4K" in done.output
    assert "warning: distill flashmorph needs" in done.output and "has 48 GB" in done.output
    assert "warning: align" not in done.output
    for wrong in (["--gpu", "h10"], ["--gpus", 0], ["--share", 2], ["--set", "align.tokens=x"]):
        done = planned("qwen3-0.6b", *wrong)
        assert done.exit_code == 2 and len(done.output.splitlines()) == 1, done.output


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_a_plan_is_readable_at_80_columns(name, gpus):
    "Every line is a heading, a rule or a whole row, but for the sentence at the end."
    made = plan(load_recipe(name), machine=Machine("h100", gpus))
    console = Console(width=80, force_jupyter=False)
    with console.capture() as shown: console.print(made)
    lines = [line.strip() for line in shown.get().splitlines() if line.strip()]
    rows = [line for line in lines if line.startswith(tuple(s.label for s in made.stages))]
    # headings of one line and of two, two rules, and the sentence
    assert len(rows) == 2 * len(made.stages) == len(lines) - 3 - 2 - 2
    for row, cells in zip(rows, [s.hours(made.machine) for s in made.stages], strict=False):
        assert row.split() == " ".join(cells).split()
    assert " ".join(lines[-2:]) == str(made)


def test_steps_that_gpus_cannot_share_are_warned_of():
    recipe = small_recipe("bundled", gates={"steps": 2, "batch_size": 2, "accumulate": 2},
                          finetune={"steps": 2, "batch_size": 8, "precision": "no"})
    lines = plan(recipe, machine=Machine("h100", 8)).warnings()
    assert [line.split(":")[0] for line in lines] == ["align", "gates", "distill flashmorph"]
    assert "a step of 4 rows (batch_size 2, accumulate 2) cannot be shared by 8" in lines[1]
    assert plan(recipe, machine=Machine("h100", 2)).warnings() == []
    # eight hold one row each, and copies in 16 bits, which are whole, left out
    finetune = [plan(recipe, machine=Machine("h100", n)).stages[4].parts for n in (1, 8)]
    assert 7.9 < finetune[0].activations / finetune[1].activations < 8.1


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen3-0.6b", "qwen3-1.7b"])
def test_advice_on_steps_that_cannot_be_shared_works(name):
    "`accumulate` as the warning says, and nothing is refused; the tokens stay."
    machine = Machine("h100", 8)
    made = plan(load_recipe(name), machine=machine)
    advice = {line.split(":")[0]: re.search(r"accumulate = \d+", line)[0]
              for line in made.warnings()}
    assert advice == {"gates": "accumulate = 8"}
    changes = [f"{stage}.{text.replace(' ', '')}" for stage, text in advice.items()]
    mended = plan(load_recipe(name, changes), machine=machine)
    assert mended.warnings() == []
    for old, new in zip(made.stages, mended.stages, strict=True):
        assert abs(new.tokens / old.tokens - 1) < 0.01


def test_gpus_gather_what_computes():
    """Against sizes of the real modules: the largest layer of a group twice, embeddings and head
    once; the format of the teacher for what is frozen, four bytes and gradients for what trains."""
    recipe = small_recipe("bundled", finetune={"steps": 1, "batch_size": 2}, mixer="gdn")
    stages = {s.stage: s.parts for s in plan(recipe, machine=Machine("h100", 2)).stages}
    alone = {s.stage: s.parts for s in plan(recipe, machine=Machine("h100", 1)).stages}
    assert all(parts.gathered == 0 for parts in alone.values())
    assert stages["exchange"].gathered == 0
    teacher, _ = load_teacher()
    model = morph(teacher, "gdn")
    hybrid = model.commit([0, 1])
    def size(module): return sum(p.numel() for p in {*module.parameters()})
    decoder = hybrid.host.base_model
    norm = size(decoder.norm)               # is spread over the layers
    tables = size(hybrid.host) - size(decoder.layers) - norm
    both = max(map(size, model.host.base_model.layers))
    linear = max(map(size, decoder.layers))
    close = {"rel": 2 * norm / tables}
    for stage in ("align", "gates"):
        assert stages[stage].gathered == pytest.approx(4 * (tables + 2 * both), **close)
    branches = sum(size(layer.linear) for layer in model.layers)
    assert stages["align"].gradients == pytest.approx(4 * branches * (1 + 1 / 2))
    computes = 4 * (tables + 2 * linear)
    assert stages["finetune-flashmorph"].gathered == pytest.approx(computes, **close)
    assert stages["distill-flashmorph"].gathered == pytest.approx(computes + 4 * tables, **close)
    slopes = stages["distill-flashmorph"].gradients - 4 * size(hybrid) / 2
    assert slopes == pytest.approx(computes, **close)
    # the teacher in 16 bits takes half
    half = load_teacher()[0].config
    half.dtype = torch.bfloat16
    frozen = plan(recipe, half, machine=Machine("h100", 2)).stages[3].parts.gathered
    assert frozen == pytest.approx(computes + 2 * tables, **close)


@pytest.mark.parametrize("changes, ways", [
    ({"batch_size": 10**5}, planning.WAYS), ({"batch_size": 10**5, "recompute": True}, (0, 2)),
    ({"batch_size": 1}, (1, 2))])
def test_a_warning_names_what_helps(monkeypatch, changes, ways):
    "Smaller batches only where there is more than a row, and neither where weights need too much."
    recipe = small_recipe("bundled", distill={"steps": 1, **changes}, passkeys={"length": 512},
                          text={"length": 512})
    taken = plan(recipe, machine=Machine("h100")).stages[3]
    wanted = tuple(planning.WAYS[i] if isinstance(i, int) else i for i in ways)
    for memory, found in ((taken.parts.lasting + 1, wanted), (taken.parts.lasting, wanted[-1:])):
        monkeypatch.setitem(machines.GPUS, "h100", (1e12, memory))
        made = plan(recipe, machine=Machine("h100"))
        assert made.stages[3].ways == found
        line = next(line for line in made.warnings() if line.startswith("distill"))
        assert line.endswith(machines.in_words(found))


def test_memory_follows_the_settings():
    def held(**stage):
        recipe = small_recipe("bundled", distill={"steps": 1, **stage})
        return plan(recipe, rate=1e9, machine=Machine("cpu")).stages[3].parts
    one, two = held(batch_size=4), held(batch_size=8)
    assert 1.9 < two.activations / one.activations < 2.1 and two.gradients == one.gradients
    again = held(batch_size=8, recompute=True)
    assert again.activations + again.again < two.activations / 3
    assert held(batch_size=4, accumulate=2).total() > one.total()


def test_a_run_that_cannot_fit_is_warned_of(monkeypatch):
    monkeypatch.setattr(machines, "memory_here", lambda: 1000)
    warned = plan(small_recipe("bundled"), rate=1e9).warnings()
    assert len(warned) == 5 and all("this machine has 1 KB" in line for line in warned)


def test_convert_warns_before_it_trains(monkeypatch, tmp_path):
    "Of what is held beside the weights, too: all stages fit but the one with large batches."
    def say(line):
        said.append(line)
        if line.startswith("align the"): raise KeyboardInterrupt
    said = []
    monkeypatch.setattr(machines, "memory_here", lambda: 10**9)
    recipe = small_recipe("bundled", distill={"steps": 1, "batch_size": 400})
    with pytest.raises(KeyboardInterrupt): convert(recipe, tmp_path / "run", say=say)
    needs = [line for line in said if "needs" in line]
    assert len(needs) == 1 and needs[0].startswith("distill flashmorph needs")
    assert "this machine has 1 GB" in needs[0] and said.index(needs[0]) < len(said) - 1


def test_an_optimizer_has_its_memory_and_its_work():
    def stage(**settings):
        recipe = small_recipe("bundled", distill={"steps": 3, **settings})
        return plan(recipe, rate=1e9, machine=Machine("cpu")).stages[3]
    plain, fused, muon, small = (
        stage(optimizer=name) for name in ("adamw", "adamw-fused", "muon", "adamw-8bit"))
    assert plain.parts.optimizer == fused.parts.optimizer == 8 * plain.parts.gradients / 4
    assert 0.25 < small.parts.optimizer / plain.parts.optimizer < 0.26
    assert 0.5 < muon.parts.optimizer / plain.parts.optimizer < 0.6
    assert plain.flops == small.flops < muon.flops
    # Muon's products, as PyTorch counts them in one step of all weights
    teacher, _ = load_teacher()
    hybrid = morph(teacher).commit([3, 4, 8]).requires_grad_(True)
    for p in hybrid.parameters(): p.grad = torch.zeros_like(p)
    optimizer = make_optimizer("muon", hybrid, hybrid.parameters(), 1e-3)
    with FlopCounterMode(display=False) as counter: optimizer.step()
    recipe = small_recipe("bundled", budget=3, distill={"steps": 3, "optimizer": "muon"})
    planned = plan(recipe, rate=1e9).stages[3].flops
    recipe = small_recipe("bundled", budget=3, distill={"steps": 3})
    assert planned - plan(recipe, rate=1e9).stages[3].flops == 3 * counter.get_total_flops()
