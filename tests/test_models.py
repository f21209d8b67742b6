"Models side by side: the same rows for all, intervals, and no text that was trained on."
import json
import math
import warnings

import pytest
import torch
from small import other_tokenizer, save_teacher
from typer.testing import CliRunner

from flashmorph.data.text import text
from flashmorph.measure.evaluate import HELD_OUT, evaluate
from flashmorph.model.morph import morph
from flashmorph.model.teacher import load_model, load_teacher
from flashmorph.run import cli
from flashmorph.run.models import evaluate_models
from flashmorph.scores import read_comparison

FEW = {"length": 128, "keys": 2, "words_per_key": 2, "books": 5}


def command(*args):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, args)], prog_name="flashmorph")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A run of the bundled teacher with a hybrid, trained on a file."
    folder = tmp_path_factory.mktemp("runs") / "one"
    teacher, tokenizer = load_teacher()
    hybrid = morph(teacher).commit([1, 4, 7])
    for part in (hybrid, tokenizer): part.save_pretrained(folder / "hybrid")
    (folder / "run.json").write_text('{"flashmorph": 2, "id": "a"}')
    recipe = f'teacher = "bundled"\n[text]\nsource = "{folder}/text.txt"\n'
    (folder / "recipe.toml").write_text(recipe)
    (folder / "results.json").write_text('{"spent": {"align": {"tokens": 3000}}}')
    return folder


def write(path, count):
    lines = [f"Anna number {i} went home to the river and met {i} bakers." for i in range(count)]
    path.write_text("\n".join(lines))
    return path


def test_scores_are_those_of_evaluate(run):
    found = evaluate_models(["bundled", str(run)], **FEW, batch_size=2)
    for model, name in zip(found.models, ("bundled", run / "hybrid")):
        whole = evaluate(*load_model(name), **FEW)
        for key in ("recall", "exact", "answer_nll", "lm_nll"):
            assert model.scores[key].value == pytest.approx(getattr(whole, key), abs=1e-4)
        assert model.scores["perplexity"].value == pytest.approx(math.exp(whole.lm_nll), rel=1e-3)
    assert found.models[1].facts["full_layers"] == [1, 4, 7]
    assert found.models[1].facts["trained_tokens"] == 3000


def test_perplexity_by_position(run):
    "Against the logits of the same rows, stretch by stretch."
    teacher, tokenizer = load_teacher()
    (model,) = evaluate_models(["bundled"], **FEW).models
    rows = iter(text(tokenizer, length=128, seed=HELD_OUT + 1, held_out=True))
    losses = []
    for _ in range(5):
        ids = next(rows)["input_ids"][None]
        with torch.no_grad(): logits = teacher(ids).logits[0, :-1].double().log_softmax(-1)
        losses.append(-logits.gather(1, ids[0, 1:, None])[:, 0])
    losses = torch.stack(losses)
    for name, score in model.positions.items():
        first, last = map(int, name.split("-"))
        part = losses[:, first - 1:last].mean(1)
        half = 1.96 * part.std().item() / math.sqrt(5)
        middle = part.mean().item()
        assert score.value == pytest.approx(math.exp(middle), rel=1e-4)
        assert score.low == pytest.approx(math.exp(middle - half), rel=1e-3)
        assert score.high == pytest.approx(math.exp(middle + half), rel=1e-3)
    assert [*model.positions] == ["1-31", "32-63", "64-127"]


def test_every_number_has_an_interval(run):
    (model,) = evaluate_models([str(run)], **FEW, lengths=[96, 128], depths=2).models
    numbers = [*model.scores.values(), *model.positions.values(), *model.cells.values()]
    assert all(s.low <= s.value <= s.high and s.how and s.count for s in numbers)
    assert {"recall at 96 tokens", "recall at 128 tokens"} <= model.scores.keys()
    # the map, its cells and the score of a length are of the same answers
    counts, recall = ([row[0] for row in part] for part in (model.grid.counts, model.grid.recall))
    mean = sum(c * r for c, r in zip(counts, recall) if c) / sum(counts)
    assert model.scores["recall at 96 tokens"].value == pytest.approx(mean)


def test_text_that_was_trained_on_is_refused(run, tmp_path):
    "Nothing of one document can be held out, so the run's training has read it."
    alone = {**FEW, "books": 2}
    write(run / "text.txt", 1)
    with pytest.raises(ValueError, match="was trained on all of .*evaluate on another text"):
        evaluate_models([str(run / "hybrid")], source=str(run / "text.txt"), **alone)
    # the same document for a model whose training is not on record
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = save_teacher(tmp_path / "teacher")
        (model,) = evaluate_models([str(folder)], source=str(run / "text.txt"), **alone).models
    assert "not on record" in model.facts["text"]


def test_documents_that_were_held_out_are_read(run):
    write(run / "text.txt", 2000)
    (model,) = evaluate_models([str(run)], source=str(run / "text.txt"), **FEW).models
    assert model.facts["text"] == "held-out documents, which the run did not read"
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace('"bundled"', '"owner/teacher"'))
    try: (model,) = evaluate_models([str(run)], source=str(run / "text.txt"), **FEW).models
    finally: (run / "recipe.toml").write_text(recipe)
    assert "what the teacher read before is not on record" in model.facts["text"]


def test_the_command_writes_what_it_prints(run, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "a.jsonl").write_text('{"text": "Anna", "words": ["went", "of"]}\n' * 3)
    (tasks / "a.yaml").write_text(json.dumps({
        "task": "a", "dataset_path": "json", "test_split": "test", "doc_to_text": "{{text}}",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "a.jsonl")}}, "doc_to_target": 0,
        "output_type": "multiple_choice", "doc_to_choice": "words"}))
    done = command(
        "bundled", run, "--length", 128, "--keys", 1, "--words-per-key", 2, "--books", 2,
        "--lengths", "256,512", "--ruler", "niah_single_1", "--set", "samples=2", "--set",
        "depths=2", "--lm-eval", "a", "--include", tasks, "--keep", tmp_path / "kept",
        "--json", tmp_path / "s.json", "--html", tmp_path / "s.html")
    assert done.exit_code == 0, done.output
    found = read_comparison(json.loads((tmp_path / "s.json").read_text()))
    page = (tmp_path / "s.html").read_text()
    assert {"recall", "perplexity", "a acc", "niah_single_1 at 512"} <= set(found.names)
    for name in found.names:
        assert name.split()[0] in done.output
        for model in found.models:
            assert str(model.scores[name]) in page
            assert str(model.scores[name]).split()[0] in done.output
    assert "full attention in 3 of 12 layers" in " ".join(page.split())
    assert len(list((tmp_path / "kept").glob("a-*.json"))) == 2


def test_models_with_other_tokenizers_are_marked(tmp_path):
    folder = save_teacher(tmp_path / "t", tokenizer=other_tokenizer())
    found = evaluate_models(["bundled", str(folder)], **{**FEW, "length": 256, "books": 2})
    assert not found.comparable
    assert evaluate_models(["bundled"], **{**FEW, "books": 2}).comparable


@pytest.mark.parametrize("args, message", [
    (["./nowhere"], "expected a folder with config.json"),
    (["bundled", "--length", 5000], "evaluate.length: expected at most 4096 tokens"),
    (["bundled", "--lengths", "9000"], "evaluate.length: expected at most 4096 tokens"),
    (["bundled", "--ruler", "niah_single_1"], "expected lengths too"),
    (["bundled", "--split", "test"], "evaluate.split = 'test' has no meaning here"),
    (["bundled", "--set", "boks=1"], "did you mean 'books'"),
    (["bundled", "--device", "nope"], "nope"),
])
def test_errors_are_one_line(args, message):
    done = command(*args)
    assert done.exit_code == 2 and message in done.output
    assert done.output.splitlines()[-1].startswith("flashmorph: ")
