"Evaluation: on text that training never reads, of the given source, with numbers that count."
import itertools
import sys

import datasets
import pytest
import torch
from small import other_tokenizer, save_teacher
from transformers import AutoModelForCausalLM

from flashmorph.data.passkeys import passkeys
from flashmorph.data.text import text
from flashmorph.measure.evaluate import HELD_OUT, EvaluateConfig, evaluate, evaluate_text
from flashmorph.measure.recall import recall_map
from flashmorph.model.teacher import load_teacher

module = sys.modules["flashmorph.measure.evaluate"]
FEW = {"length": 128, "keys": 2, "words_per_key": 2, "books": 4}


@pytest.fixture(scope="module")
def bundled(): return load_teacher()


@pytest.fixture(scope="module")
def random_teacher(tmp_path_factory):
    folder = save_teacher(tmp_path_factory.mktemp("teacher") / "t")
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def read(monkeypatch):
    "The rows that an evaluation reads, by what it is for."
    rows = {"books": [], "text": []}

    def books(model, books, count=64, batch_size=8):
        rows["books"] += list(itertools.islice(books, count))
        return {"recall": 0.0, "exact": 0.0, "answer_nll": 0.0}

    def plain(model, blocks, count=64, batch_size=8):
        rows["text"] += list(itertools.islice(blocks, count))
        return 0.0
    monkeypatch.setattr(module, "evaluate_recall", books)
    monkeypatch.setattr(module, "evaluate_text", plain)
    return rows


def sentences(count: int) -> list[str]:
    return [f"Anna number {i} went home to the river and met {i} bakers." for i in range(count)]


def ids_of(words: str) -> list[int]: return [int(word) for word in words.split() if word.isdigit()]


class Words:
    "A token for each number of a text; no other word has one."
    eos_token_id, bos_token_id = 0, None
    def __call__(self, words, **_): return {"input_ids": ids_of(words) or [7]}
    def decode(self, ids, **_): return " ".join(map(str, ids))


def test_evaluation_reads_what_training_does_not(tmp_path, random_teacher, read):
    "26: a document is in the training's rows, or in the evaluation's, and never in both."
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"{i} {i}" for i in range(10, 3010)))
    evaluate(random_teacher, Words(), source=str(path), length=16, keys=1, words_per_key=1, books=5)
    held = {int(i) for row in read["text"] for i in row["input_ids"]} - {0}
    trained = {int(i) for row in itertools.islice(text(Words(), path, length=16), 600)
               for i in row["input_ids"]}
    assert len(held) > 20 and not held & trained
    background = {int(i) for row in read["books"] for i in row["input_ids"] if i >= 10}
    assert background <= held


def test_stories_are_held_out_by_their_seed(bundled, read):
    "The demo's numbers: books of one seed, text of the next."
    model, tokenizer = bundled
    evaluate(model, tokenizer, **FEW)
    shape = {name: FEW[name] for name in ("length", "keys", "words_per_key")}
    for name, stream in (("books", passkeys(tokenizer, **shape, seed=HELD_OUT)),
                         ("text", text(tokenizer, length=128, seed=HELD_OUT + 1))):
        expected = [row["input_ids"] for row in itertools.islice(stream, 4)]
        assert torch.equal(torch.stack([row["input_ids"] for row in read[name]]),
                           torch.stack(expected))


def test_evaluation_warns_if_nothing_is_held_out(tmp_path, bundled, read):
    path = tmp_path / "a.txt"
    path.write_text(sentences(1)[0])
    with pytest.warns(UserWarning, match="no document is held out"):
        evaluate(*bundled, source=str(path), **FEW)


@pytest.mark.parametrize("measure", ["evaluate", "recall_map"])
def test_every_reading_asks_for_the_subset(monkeypatch, bundled, measure):
    "25: split, subset and column reach the hub from each kind of evaluation."
    calls = []

    def load(path, name=None, **options):
        calls.append((path, name, options["split"]))
        rows = datasets.Dataset.from_dict({"body": sentences(500)})
        return rows.to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", load)
    source = {"source": "owner/name", "subset": "en", "split": "test", "column": "body"}
    if measure == "evaluate": evaluate(*bundled, **source, **FEW)
    else: recall_map(*bundled, (128,), books=2, **source)
    assert set(calls) == {("owner/name", "en", "test")}


@pytest.mark.parametrize("value", [0, -1, -3, True, 1.5, "x", "", None, float("nan"), float("inf"),
                                   10**30, [1, 2], {"a": 1}], ids=repr)
@pytest.mark.parametrize("key", ["books", "batch_size", "length", "keys", "words_per_key"])
def test_numbers(bundled, key, value):
    "23, S8, S16: each number is named, before anything is read."
    with pytest.raises(ValueError, match=f"evaluate.{key}: expected an integer"):
        evaluate(*bundled, **{key: value})


@pytest.mark.parametrize("settings, message", [
    ({"source": 3}, "evaluate.source: expected a string or a list of strings"),
    ({"source": []}, "evaluate.source: expected something"),
    ({"column": [1, 2]}, "evaluate.column: expected a string"),
    ({"split": "test"}, "evaluate.split = 'test' has no meaning here: stories have none"),
    ({"boks": 3}, "unknown setting evaluate.boks; did you mean 'books'"),
    ({"seed": "x"}, "seed: expected an integer"), ({"seed": None}, "seed: expected an integer"),
])
def test_settings(bundled, settings, message):
    with pytest.raises(ValueError, match=message): evaluate(*bundled, **settings)


def test_what_is_no_model_or_tokenizer(bundled):
    model, tokenizer = bundled
    with pytest.raises(TypeError, match="model: expected a model"): evaluate(None, tokenizer)
    with pytest.raises(TypeError, match="tokenizer: expected"): evaluate(model, None)


def test_a_tokenizer_of_another_model(random_teacher):
    "T2: ids that the model does not have are named, and no index is out of range."
    class Large(Words):
        def __call__(self, words, **_): return {"input_ids": [10**6] * 3}
    with pytest.raises(ValueError, match="token 1000000 is not in the model's vocabulary"):
        evaluate_text(random_teacher, text(Large(), length=8), 2)
    tokenizer = other_tokenizer()
    rows = text(tokenizer, length=16)
    assert evaluate_text(random_teacher, rows, 2) > 0       # a smaller vocabulary does work


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers(tmp_path, random_teacher, number):
    "S6: a broken model has no score, and is left in the mode it was in."
    random_teacher.train()
    weight = random_teacher.get_input_embeddings().weight
    before = weight.detach().clone()
    with torch.no_grad(): weight[5:] = number
    tokenizer = load_teacher()[1]
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            evaluate(random_teacher, tokenizer, **FEW)
        with pytest.raises(FloatingPointError, match="not finite"):
            recall_map(random_teacher, tokenizer, (128,), books=1)
        assert random_teacher.training
    finally:
        with torch.no_grad(): weight.copy_(before)
        random_teacher.eval()


@pytest.mark.parametrize("options, message", [
    ({"depths": 0}, "depths: expected an integer >= 1"),
    ({"depths": "x"}, "depths: expected an integer >= 1"),
    ({"books": 0}, "books: expected an integer >= 1"),
    ({"batch_size": 0}, "batch_size: expected an integer >= 1"),
    ({"lengths": 128}, "lengths: expected at least one length, in a list"),
    ({"lengths": ("x",)}, "lengths: expected an integer >= 1"),
    ({"lengths": ()}, "lengths: expected at least one length"),
    ({"keys": 10**30}, "passkeys.keys: expected an integer"),
    ({"subset": "en"}, "stories have none"),
])
def test_maps(bundled, options, message):
    with pytest.raises(ValueError, match=message): recall_map(*bundled, **options)


def test_fewer_rows_than_asked_for(bundled):
    rows = list(itertools.islice(text(bundled[1], length=32), 3))
    with pytest.raises(ValueError, match="expected 64 rows, got 3"):
        evaluate_text(bundled[0], rows)


def test_scores_do_not_depend_on_the_batch(bundled):
    "The same books in batches of one, three and eight."
    config = EvaluateConfig(**FEW)
    scores = [evaluate(*bundled, **{**FEW, "batch_size": size}) for size in (1, 3, 8)]
    assert len({score.recall for score in scores}) == 1 and scores[0].books == config.books
    assert all(abs(score.lm_nll - scores[0].lm_nll) < 1e-5 for score in scores)
