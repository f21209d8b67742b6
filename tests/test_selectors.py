"Every selector of the registry on a tiny random teacher: protocol, resumption and errors."

import itertools
import json

import pytest
import torch
from small import save_teacher, small_recipe
from tiny_models import tiny_model

from flashmorph.choose.ablate import AnswerDivergence, remove_one
from flashmorph.choose.rank import SELECTORS, check_fits, rank, weights_digest
from flashmorph.data.passkeys import passkeys
from flashmorph.model.morph import MorphableModel, morph
from flashmorph.model.recompute import shares_blocks
from flashmorph.model.teacher import load_teacher
from flashmorph.run.convert import convert
from flashmorph.run.ranking import run_ranking
from flashmorph.selection import Ranking, Selection

BUILT_IN = [name for name, one in SELECTORS.items() if one.function.__module__ != "__main__"]
# few steps, for selectors that train
QUICK = {
    "flashmorph": {"steps": 3, "batch_size": 2, "progress": False},
    "dash": {"steps": 4}, "consa": {"steps": 4}, "flashmorph-text": {"steps": 4},
    "ga-s2": {"steps": 1, "train_batch": 1}, "postnas": {"steps": 2, "train_batch": 2},
}
for name in ("flashmorph-raw", "flashmorph-relative"): QUICK[name] = QUICK["flashmorph"]
QUICK["flashmorph-swap"] = {"steps": 3}
for name in ("kl-ls", "gr-s2", "avg-s2"): QUICK[name] = QUICK["ga-s2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def model(teacher):
    return morph(load_teacher(str(teacher))[0])


@pytest.fixture(scope="module")
def books():
    _, tokenizer = load_teacher()
    return list(itertools.islice(passkeys(tokenizer, length=64, keys=1, words_per_key=2), 12))


def settings_of(name):
    settings = dict(QUICK.get(name, {}))
    trained = ("flashmorph", "flashmorph-raw", "flashmorph-relative")
    if name not in trained: settings["count"] = 4
    if SELECTORS[name].one_budget: settings["budget"] = 2
    return settings


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_selector_ranks_twice_the_same_and_leaves_the_model_alone(name, model, books, tmp_path):
    model.gates = [0.25, 0.5, 0.75, 1.0]
    weights = weights_digest(model)
    flags = [p.requires_grad for p in model.parameters()]
    first = rank(model, iter(books), name, **settings_of(name))
    again = rank(model, iter(books), name, **settings_of(name))
    assert (again, sorted(first.order)) == (first, [0, 1, 2, 3])
    assert first.method == name
    assert first.select(2).budget == 2
    assert model.gates.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert weights_digest(model) == weights
    assert [p.requires_grad for p in model.parameters()] == flags
    kept = Ranking.load(first.save(tmp_path))
    assert (kept, kept.facts) == (first, first.facts)
    assert kept.facts["seconds"] > 0
    check_fits(kept, model)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_model_in_16_bits_is_as_before(name, teacher, books):
    half = morph(load_teacher(str(teacher))[0].bfloat16())
    before = {key: x.clone() for key, x in half.state_dict().items()}
    ranking = rank(half, iter(books), name, **settings_of(name))
    assert sorted(ranking.order) == [0, 1, 2, 3]
    after = half.state_dict()
    assert {key: x.dtype for key, x in after.items()} == {key: x.dtype for key, x in before.items()}
    assert all(torch.equal(x, before[key]) for key, x in after.items())


WITH_LOG = [name for name in BUILT_IN if name not in (
    "uniform", "uniform-start", "random", "alignment", "ga-s1", "postnas", "flashmorph",
    "flashmorph-raw", "flashmorph-relative")]


@pytest.mark.parametrize("name", WITH_LOG)
def test_a_killed_ranking_asks_only_for_what_is_missing(name, model, books, tmp_path, monkeypatch):
    asked = []
    commit = MorphableModel.commit

    def committed(self, *args, **kwargs):
        asked.append("commit")
        return commit(self, *args, **kwargs)
    monkeypatch.setattr(MorphableModel, "commit", committed)
    decoder = model.host.base_model
    hook = decoder.register_forward_pre_hook(lambda *args: asked.append("pass"))
    log = tmp_path / "log.jsonl"
    settings = settings_of(name) | {"batch_size": 2}
    whole = rank(model, books, name, log=log, **settings)
    once = len(asked)
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:len(lines) // 2]))
    again = rank(model, books, name, log=log, **settings)
    twice = len(asked) - once
    finished = rank(model, books, name, log=log, **settings)
    thrice = len(asked) - once - twice
    hook.remove()
    assert again == whole == finished
    assert once > twice > thrice


def test_books_without_answers_and_models_without_two_branches_are_refused(model, books, teacher):
    silent = [{"input_ids": row["input_ids"]} for row in books]
    for name in ("remove-one", "gradient", "nll-guided", "halo-jet", "ar", "swap"):
        with pytest.raises(ValueError, match="expected tokens to answer"):
            rank(model, silent, name, **settings_of(name))
    # text is enough for scores of text
    assert rank(model, silent, "perplexity", count=4) == rank(model, books, "perplexity", count=4)
    with pytest.raises(TypeError, match="expected a morphable model"):
        rank(load_teacher(str(teacher))[0], books, "remove-one")


def test_wrong_settings_are_refused_before_the_model_is_asked(model, books, monkeypatch):
    def never(*args, **kwargs): raise AssertionError("asked")
    monkeypatch.setattr(MorphableModel, "hidden", never)
    for name, settings, message in (
        ("remove-onee", {}, "did you mean 'remove-one'"),
        ("remove-one", {"cuont": 3}, "did you mean 'count'"),
        ("remove-one", {"count": 0}, "rank.count: expected"),
        ("beam", {}, "rank.budget: this selector searches for one budget"),
        ("periodic", {"budget": 2, "by": "uniform"}, "rank.by: expected a selector that scores"),
        ("gradient", {"loss": "answer"}, "rank.loss: expected one of"),
        ("kl-ls", {"count": None}, "rank.count: expected a number of books"),
        ("kl-ls", {"count": 4, "steps": 90}, "books: expected 4 to hold out and 360"),
    ):
        with pytest.raises(ValueError, match=message): rank(model, books, name, **settings)


def test_a_teacher_of_one_layer_has_nothing_to_rank(tmp_path, books):
    single = morph(load_teacher(str(save_teacher(tmp_path, num_hidden_layers=1)))[0])
    with pytest.raises(ValueError, match="two layers or more"):
        rank(single, books, "remove-one")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2", "phi", "olmo2", "mixtral"])
def test_shared_blocks_give_the_same_numbers_in_other_families(family):
    model = morph(tiny_model(family))
    assert shares_blocks(model)
    ids = torch.randint(10, 100, (6, 24), generator=torch.Generator().manual_seed(0))
    answers = torch.zeros_like(ids)
    answers[:, -5:] = 1
    rows = [{"input_ids": i, "answers": a} for i, a in zip(ids, answers)]
    fast, slow = (AnswerDivergence(model, rows, share=share) for share in (True, False))
    assert remove_one(fast) == remove_one(slow)
    assert fast.ran < slow.ran


def test_a_recipe_with_another_selector_commits_its_layers_and_resumes(teacher, tmp_path):
    recipe = small_recipe(teacher, method="remove-one", rank={"count": 4}, finetune={"steps": 0})
    results = convert(recipe, tmp_path / "run", progress=False)
    ranking = Ranking.load(tmp_path / "run")
    assert results["layers"] == list(ranking.select(2).layers)
    assert Selection.load(tmp_path / "run").method == "remove-one"
    assert not (tmp_path / "run" / "gates.json").exists()
    assert convert(None, tmp_path / "run", resume=True) == results
    # the run's own order at another budget, and another selector on its branches
    assert run_ranking(tmp_path / "run", None, 1) == ranking
    assert run_ranking(tmp_path / "run", "remove-one", 1, count=4).order == ranking.order
    other = run_ranking(tmp_path / "run", "eliminate", 1, count=4)
    assert json.loads((tmp_path / "run/rankings/eliminate.json").read_text())["order"] == [
        *other.order]
