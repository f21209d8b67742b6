"Recipes by name: the paper's numbers, tokens for steps, and whole conversions of small teachers."
import json
import re
import tomllib

import pytest
import torch
import zstandard
from safetensors.torch import load_file
from small import save_teacher
from typer.testing import CliRunner

from flashmorph import load_teacher
from flashmorph.run.cli import app
from flashmorph.run.recipe import (
    STAGES, Recipe, load_recipe, recipe_from_dict, recipe_toml, shipped_recipes)
from flashmorph.run.recipes import stage_tokens

NAMES = list(shipped_recipes())
PAPER = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen3-30b-a3b", "qwen3-1.7b-hypenet"]
# steps short enough for a test; the rest is the recipe's
FEW = [
    "text.source=stories", "text.length=64", "text.passkeys=0", "text.shards=2", "text.workers=1",
    "passkeys.length=192", "passkeys.min_length=160", "passkeys.keys=2",
    "passkeys.words_per_key=2", "align.tokens=256", "align.batch_size=2", "align.accumulate=1",
    "gates.tokens=704", "gates.batch_size=2", "gates.accumulate=1", "distill.tokens=256",
    "distill.batch_size=2", "distill.accumulate=1", "finetune.tokens=384",
    "finetune.batch_size=1", "finetune.accumulate=1", "evaluate.books=2",
]


def flashmorph(*args, **env):
    return CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "110", **env})


def test_the_names_that_are_promised():
    models = ["qwen3-0.6b", "qwen3-1.7b", "qwen3-8b", "qwen3-30b-a3b", "smollm2-135m", "demo"]
    assert {name + more for name in models for more in ("", "-cheap")} <= set(NAMES)
    assert {"qwen3-1.7b-hypenet", "qwen3-1.7b-traces", "longer"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_printed_saved_and_read_back(name, tmp_path):
    printed = flashmorph("recipes", name)
    assert printed.exit_code == 0
    (tmp_path / "mine.toml").write_text(printed.output)
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe == load_recipe(name) == recipe_from_dict(tomllib.loads(recipe_toml(recipe)))
    assert recipe.budget is not None or recipe.teacher != "bundled"


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_settings(name):
    "The numbers of the appendix of arXiv 2606.30562, written down a second time."
    recipe = load_recipe(name)
    wanted = {"align": 320e6, "gates": 20e6, "distill": 1e9, "finetune": 1e9}
    lengths = {"align": 512, "gates": (1024 + 16384) / 2, "distill": 512, "finetune": 16384}
    for stage, tokens in stage_tokens(recipe).items():
        row = recipe[stage].batch_size * recipe[stage].accumulate * lengths[stage]
        assert 0 <= tokens - wanted[stage] < row
    rates = {stage: (recipe[stage].lr, recipe[stage].lr_end) for stage in STAGES}
    assert rates == {"align": (1e-3, 1e-5), "gates": (2e-2, 2e-3), "distill": (1e-4, 1e-5),
                     "finetune": (1e-5, None)}
    assert (recipe.align.optimizer, recipe.align.betas, recipe.align.start) == (
        "adamw", (0.9, 0.95), "copy")
    assert (recipe.gates.align, recipe.gates.lam, recipe.gates.start) == ("raw", 0.1, 1.0)
    books = recipe.passkeys
    assert (books.keys, books.words_per_key, books.depths, books.length) == (10, 32, 1000, 16384)
    assert books.min_length == 1024
    assert recipe.mixer == "lightning(expand_kv=True)" and recipe.text.length == 512
    hypenet = name.endswith("hypenet")
    assert (recipe.full_rope, recipe.logit_scale) == ((False, 500) if hypenet else (True, None))


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith("-cheap")])
def test_cheap_is_cheaper(name):
    dear, cheap = load_recipe(name.removesuffix("-cheap")), load_recipe(name)
    assert cheap.teacher == dear.teacher
    ratio = sum(stage_tokens(dear).values()) / sum(stage_tokens(cheap).values())
    assert ratio > 20 if "qwen" in name else ratio > 3


def test_the_table_has_a_row_for_each():
    shown = flashmorph("recipes").output
    for name in NAMES: assert re.search(rf"^ *{re.escape(name)} ", shown, re.MULTILINE), name
    row = next(line for line in shown.splitlines() if line.strip().startswith("qwen3-8b "))
    assert row.split()[1:5] == ["320M", "20.1M", "1B", "1B"]


def test_unknown_names_are_one_line():
    for args in (("recipes",), ("convert",), ("convert", "--plan")):
        args = (*args, "qwen3-0.6")
        done = flashmorph(*args)
        assert done.exit_code == 2 and "did you mean 'qwen3-0.6b'" in done.output, args


def test_tokens_for_steps(monkeypatch):
    text = {"text": {"length": 100}, "align": {"tokens": "1K", "batch_size": 3}}
    assert Recipe(**text).align.steps == 4                      # 4 * 3 rows of 100 reach 1,000
    monkeypatch.setenv("WORLD_SIZE", "4")                       # processes share the rows of a step
    assert Recipe(**text).align.steps == 4
    for wrong in ("10 Mio", -1, True, "1e6x", 0.5, float("nan"), float("inf"), 10**40, [1]):
        with pytest.raises(ValueError, match=r"align\.(tokens|steps): expected"):
            Recipe(align={"tokens": wrong})
    with pytest.raises(ValueError, match="align: expected steps or tokens, got both"):
        Recipe(align={"tokens": "1M", "steps": 3})
    assert Recipe(finetune={"tokens": 0}).finetune.steps == 0
    # the newer of the two holds, also in a run's own recipe
    assert load_recipe("demo", ["align.tokens=8192"]).align.steps == 4
    assert load_recipe("qwen3-8b", ["align.steps=7"]).align.steps == 7


@pytest.mark.parametrize("name, family, sizes", [
    ("qwen3-0.6b", "qwen3", {}),
    ("qwen3-30b-a3b", "qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2,
                                    "moe_intermediate_size": 24, "tie_word_embeddings": False}),
    ("qwen3-1.7b-hypenet", "qwen3", {}),
])
def test_small_teachers_go_through_all_stages(name, family, sizes, tmp_path):
    teacher = save_teacher(tmp_path / "teacher", family, **sizes)
    changes = [f"--set={change}" for change in (f"teacher={teacher}", *FEW)]
    done = flashmorph("convert", name, "--out", tmp_path / "run", *changes)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["spent"]) == {"align", "gates", "distill-flashmorph", "finetune-flashmorph"}
    assert results["spent"]["align"]["tokens"] == 256 and results["budget"] == 1
    assert set(results["models"]["flashmorph"]) >= {"zero_shot", "distilled", "finetuned"}
    config = json.loads((tmp_path / "run" / "hybrid" / "config.json").read_text())
    assert config["full_rope"] is not name.endswith("hypenet")
    if family != "qwen3_moe": return

    # experts and routers train in stages 3 and 4, without an auxiliary loss
    assert '"output_router_logits": true' not in json.dumps(config)
    before = load_file(teacher / "model.safetensors")
    after = load_file(tmp_path / "run" / "hybrid" / "model.safetensors")
    routers = [key for key in before if key.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for key in routers:
        found = [value for other, value in after.items() if other.endswith(key)]
        assert found and not torch.equal(found[0].float(), before[key].float()), key


def test_conversations_are_distilled_by_name(tmp_path):
    "By the teacher's own template; without one, a sentence before anything is spent."
    teacher = save_teacher(tmp_path / "teacher", "qwen3")
    chats = tmp_path / "traces.jsonl.zst"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"What is {n} + {n}?"},
                                      {"role": "assistant", "content": f"It is {n + n}. " * 9}]})
             for n in range(100)]
    chats.write_bytes(zstandard.compress("\n".join(lines).encode()))
    sources = [f"text.source={chats}", "text.column=messages", "passkeys.source=stories",
               "evaluate.source=stories"]
    few = [change for change in FEW if not change.startswith(("text.source", "finetune"))]
    changes = [f"--set={change}" for change in (f"teacher={teacher}", *sources, *few)]
    order = "convert", "qwen3-1.7b-traces", "--out", tmp_path / "run"
    done = flashmorph(*order, *changes)
    assert done.exit_code == 2 and "no chat template" in done.output
    assert not (tmp_path / "run").exists()

    _, tokenizer = load_teacher(teacher)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(teacher)
    done = flashmorph(*order, *changes)
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["spent"]) == {"align", "gates", "distill-flashmorph"}
