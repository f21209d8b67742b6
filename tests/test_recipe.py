"A recipe that can be read can be run to its end; what cannot is refused before anything is spent."
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import save_teacher, small_recipe

from flashmorph.run.materials import Materials, check_materials
from flashmorph.run.paths import absolute, with_absolute_paths
from flashmorph.run.recipe import (
    TABLES, Recipe, load_recipe, recipe_from_dict, recipe_toml, save_recipe,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


ODD = ["abc", "", -1, True, 1.5, float("nan"), float("inf"), 10**30, [], [1, 2], {"a": 1}, None]

def settings():
    for table, kind in TABLES.items():
        for name in kind.setting_names():
            if name != "seed": yield table, name, kind


@pytest.mark.parametrize("table, name, kind", list(settings()))
def test_every_setting_is_checked_when_it_is_read(table, name, kind):
    "P1, T5, S7: an odd value is refused by name, or kept as it was given, with its own type."
    for odd in ODD:
        try: recipe = recipe_from_dict({table: {name: odd}})
        except ValueError as error:
            # the nearest setting, or the one that it does not go together with
            assert table in str(error) or name in str(error), (odd, error)
        else:
            got = getattr(getattr(recipe, table), name)
            same = got == (float(odd) if isinstance(got, float) else odd)
            assert same or list(got) == odd, (odd, got)
            assert isinstance(got, bool) == isinstance(odd, bool), (odd, got)


@pytest.mark.parametrize("name", ["teacher", "mixer", "budget", "full_rope", "logit_scale", "seed",
                                  "compare"])
def test_values_of_the_recipe_are_checked(name):
    for odd in (float("nan"), 1.5, {"a": 1}, [1, 2], -1):
        if (name, odd) == ("logit_scale", 1.5): continue
        with pytest.raises(ValueError, match=f"{name}|mixer"): recipe_from_dict({name: odd})


@pytest.mark.parametrize("wrong", [
    {"distill": {"temperature": 0}}, {"distill": {"lr": -1}}, {"distill": {"precision": "fp16"}},
    {"gates": {"align": "relativ"}}, {"finetune": {"batch_size": 0}}, {"gates": {"steps": 0}},
    {"evaluate": {"books": "x"}}, {"evaluate": {"books": 0}}, {"evaluate": {"batch_size": 0}},
    {"align": {"betas": []}}, {"align": {"clip": 0}}, {"passkeys": {"words": []}},
    {"text": {"passkeys": 1.5}}, {"compare": ["uniform", "uniform"]}, {"align": {"seed": 3}},
])
def test_late_settings(wrong):
    "22, 23, L1: values that were found after hours."
    with pytest.raises(ValueError): recipe_from_dict(wrong)


def test_settings_are_read_by_name():
    "21: `recipe.distill[\"steps\"]`, as a file calls it; anything else is answered with a name."
    recipe = Recipe(distill={"steps": 7}, text={"source": "a.txt"})
    for table in TABLES:
        values = getattr(recipe, table)
        assert {name: values[name] for name in values.setting_names()} == vars(values)
    assert recipe["distill"]["steps"] == 7
    with pytest.raises(KeyError) as error: recipe.distill["stpes"]
    assert str(error.value).startswith("unknown setting distill.stpes; did you mean 'steps'?")
    for no_setting in ("check", "make", "table", "__doc__", 0, None):
        with pytest.raises(KeyError, match="unknown setting"): recipe.distill[no_setting]


def test_tables_inherit():
    "The source of the text and the sizes of the books, unless a table has its own."
    recipe = Recipe(text={"source": "a.jsonl", "column": "story"}, passkeys={"length": 96})
    assert recipe.passkeys.source == recipe.evaluate.source == "a.jsonl"
    assert recipe.evaluate.column == "story" and recipe.evaluate.length == 96
    own = Recipe(text={"source": "a.jsonl", "column": "story"}, evaluate={"source": "stories"})
    assert own.evaluate.column == "text" and own.passkeys.column == "story"


def test_what_is_written_reads_the_same(tmp_path):
    "L4, 27: emoji, quotes, and None where it is not the default."
    recipe = Recipe(
        teacher="📚 \"books\"\\t\n", align={"clip": None, "lr_end": None}, budget=None,
        distill={"lr_end": None}, passkeys={"words": ["alpha", "😀", "naïve"]})
    save_recipe(recipe, tmp_path / "r.toml")
    assert load_recipe(tmp_path / "r.toml") == recipe
    assert 'clip = "none"' in recipe_toml(recipe)
    with pytest.raises(ValueError, match="lr"): recipe_from_dict({"align": {"lr": float("inf")}})


def test_a_recipe_is_utf8_whatever_the_locale_says(tmp_path):
    "28"
    (tmp_path / "r.toml").write_text("# für alle\nbudget = 1\n", encoding="utf-8")
    code = "import sys; from flashmorph.run.recipe import load_recipe"
    code += "; print(load_recipe(sys.argv[1]).budget)"
    env = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "-c", code, str(tmp_path / "r.toml")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "1", done.stderr


def test_paths_are_kept_from_the_root(tmp_path, monkeypatch):
    "38"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    recipe = with_absolute_paths(Recipe(teacher=".", text={"source": "corpus"}))
    assert recipe.teacher == str(tmp_path)
    assert recipe.text.source == recipe.evaluate.source == str(tmp_path / "corpus")
    assert absolute("owner/name") == "owner/name" and absolute("bundled") == "bundled"


@pytest.mark.parametrize("change, message", [
    ({"text": {"length": 600}}, "text.length: expected at most 512"),
    ({"evaluate": {"length": 600, "keys": 2, "words_per_key": 2, "books": 1}}, "evaluate.length"),
    ({"budget": 9}, "budget: expected 0 to 4"),
    ({"text": {"source": "no.txt"}}, "no such file"),
    ({"evaluate": {"length": 40, "keys": 2, "words_per_key": 2}}, "too short"),
    ({"teacher": "./nowhere"}, "expected a folder"),
])
def test_what_only_the_teacher_shows(teacher, change, message):
    "S17, and everything else that is tried before anything is spent."
    with pytest.raises(ValueError, match=message):
        check_materials(Materials(replace(small_recipe(teacher), **change)))


def test_numbers_of_other_libraries_are_numbers():
    "numpy and torch scalars: a recipe holds plain ones, which TOML and JSON can write."
    odd = Recipe(budget=np.int64(2), seed=torch.tensor(3),
                 align={"steps": np.int64(2), "lr": torch.tensor(0.5)})
    assert odd == Recipe(budget=2, seed=3, align={"steps": 2, "lr": 0.5})
    assert recipe_toml(odd) == recipe_toml(Recipe(budget=2, seed=3, align={"steps": 2, "lr": 0.5}))
