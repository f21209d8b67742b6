"A teacher the project did not make goes through every stage, and what comes out is an ordinary transformers model."
import json
import subprocess
import sys

import pytest
import torch
from small import other_tokenizer, save_teacher, small_recipe
from transformers import AutoTokenizer

from flashmorph.run.cli import app
from flashmorph.measure.evaluate import evaluate
from flashmorph.measure.plan import plan
from flashmorph.run.convert import convert
from flashmorph.run.recipe import load_recipe, recipe_toml
from flashmorph.selection import Ranking, Selection
from flashmorph.model.teacher import load_model, load_teacher

FRESH = """
import json, sys, torch
import flashmorph
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(5, 25)[None]
kw = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
cached, uncached = (model.generate(ids, use_cache=u, **kw).tolist() for u in (True, False))
print(json.dumps({"logits": model(ids).logits.double().flatten().tolist(), "cached": cached, "uncached": uncached}))
"""


@pytest.fixture(scope="module")
def llama_run(tmp_path_factory):
    "A random tiny Llama with a byte-level tokenizer of its own, untied, with a beginning-of-text token."
    folder = tmp_path_factory.mktemp("llama")
    teacher = save_teacher(folder / "teacher", "llama", other_tokenizer(), tie_word_embeddings=False)
    said: list[str] = []
    recipe = small_recipe(teacher, passkeys=dict(length=300, keys=2, words_per_key=2), compare=("all_linear", "uniform"))
    results = convert(recipe, folder / "run", progress=False, say=said.append)
    return folder / "run", recipe, results, said


def test_every_stage_ran(llama_run):
    folder, recipe, results, said = llama_run
    assert json.loads((folder / "results.json").read_text()) == results
    assert set(results["models"]) == {"teacher", "flashmorph", "all_linear", "uniform"}
    for name, scores in results["models"].items():
        assert set(scores) - {"parameters", "cache_bytes"} == ({"zero_shot"} if name == "teacher" else {"zero_shot", "distilled", "finetuned"})
        assert 0 <= scores["zero_shot"]["recall"] <= 1 and scores["zero_shot"]["length"] == 300
    assert {"align", "gates", "distill-flashmorph", "finetune-flashmorph"} <= set(results["seconds"])
    trained = {stage for stage in results["seconds"] if not stage.startswith("evaluate")}
    assert set(results["spent"]) == trained
    for stage, taken in results["spent"].items():
        assert taken["seconds"] == results["seconds"][stage] and taken["peak_memory"] > 1e7
        assert taken["tokens_s"] == taken["tokens"] / taken["seconds"]
    # four steps of two rows; align's start reads 384 tokens in whole batches
    assert results["spent"]["gates"]["tokens"] == 4 * 2 * 300
    assert results["spent"]["align"]["tokens"] == 4 * 2 * 64 + 384
    assert "<h2>What it took</h2>" in (folder / "report.html").read_text()
    planned = plan(recipe, rate=1e12)
    assert said[0].startswith(str(planned).split(": at least")[0])
    tokens = {stage.stage: stage.tokens for stage in planned.stages}
    # the exchange stops by itself, at most with all that was planned
    moved = Ranking.load(folder / "rankings" / "exchange.json").facts
    assert tokens["exchange"] / 4 < moved["tokens"] <= tokens.pop("exchange")
    assert tokens == {stage: taken["tokens"] for stage, taken in results["spent"].items()}
    selection = Selection.load(folder)
    assert list(selection.layers) == results["layers"] and selection.budget == 2 and selection.digest
    assert load_recipe(folder / "recipe.toml") == recipe
    assert (folder / "report.html").stat().st_size > 1000
    assert said[1].startswith("align") and not list(folder.rglob(".*partial*"))


def test_fresh_process(llama_run):
    folder = llama_run[0] / "hybrid"
    model, _ = load_model(folder)
    got = json.loads(subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, check=True).stdout)
    with torch.no_grad(): logits = model(torch.arange(5, 25)[None]).logits.double().flatten()
    assert torch.equal(torch.tensor(got["logits"], dtype=torch.float64), logits)
    assert got["cached"] == got["uncached"] and len(got["cached"][0]) == 40
    assert AutoTokenizer.from_pretrained(folder)("hello world")["input_ids"]


def test_resuming_a_finished_run_changes_nothing(llama_run):
    folder, recipe, results, _ = llama_run
    before = (folder / "hybrid" / "model.safetensors").read_bytes()
    again = convert(None, folder, resume=True, progress=False)
    assert again["models"] == results["models"] and again["seconds"] == results["seconds"]
    assert (folder / "hybrid" / "model.safetensors").read_bytes() == before


def test_the_saved_hybrid_scores_what_the_run_says(llama_run):
    folder, _, results, _ = llama_run
    model, tokenizer = load_model(folder / "hybrid")
    scores = evaluate(model, tokenizer, length=300, keys=2, words_per_key=2, books=4)
    assert scores.recall == results["models"]["flashmorph"]["finetuned"]["recall"]
    assert abs(scores.lm_nll - results["models"]["flashmorph"]["finetuned"]["lm_nll"]) < 1e-5


def test_the_teacher_is_not_touched(llama_run, tmp_path):
    recipe = llama_run[1]
    teacher, _ = load_teacher(recipe.teacher)
    model, _ = load_model(recipe.teacher)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), model.parameters(), strict=True))


def test_command_line(llama_run, tmp_path):
    from typer.testing import CliRunner
    folder, recipe, results, _ = llama_run
    run = CliRunner().invoke
    (tmp_path / "r.toml").write_text(recipe_toml(recipe))
    out = run(app, ["convert", str(tmp_path / "r.toml"), "--out", str(tmp_path / "run"), "--set", "compare=[]", "--set", "finetune.steps=0",
                    "--set", "budget=1"])
    assert out.exit_code == 0, out.output
    made = json.loads((tmp_path / "run" / "results.json").read_text())
    assert made["budget"] == 1 and set(made["models"]) == {"teacher", "flashmorph"} and "finetuned" not in made["models"]["flashmorph"]
    out = run(app, ["select", str(folder), "--budget", "3"])
    assert out.exit_code == 0 and "3 of 4 layers" in out.output and Selection.load(folder).budget == 2      # nothing written without --save
    out = run(app, ["select", str(folder), "--budget", "9"])
    assert out.exit_code == 2 and "expected 0 to 4" in out.output
    out = run(app, ["evaluate", str(folder / "hybrid"), "--length", "300", "--keys", "2", "--words-per-key", "2", "--books", "2"])
    assert out.exit_code == 0 and "answer_nll" in out.output, out.output
