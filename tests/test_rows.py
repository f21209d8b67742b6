"Stages with a text or books of their own: inherited, counted, kept apart, resumed."
import json
from itertools import islice

import pytest
from small import Stop, events, save_teacher, small_recipe
from typer.testing import CliRunner

from flashmorph.data.sources import is_held_out
from flashmorph.measure.machines import Machine
from flashmorph.measure.plan import plan
from flashmorph.run import cli
from flashmorph.run.convert import convert
from flashmorph.run.materials import Materials, recipe_facts, stage_facts
from flashmorph.run.recipe import Recipe, load_recipe, save_recipe
from flashmorph.store import read_json


@pytest.fixture(scope="module")
def place(tmp_path_factory): return save_teacher(tmp_path_factory.mktemp("teacher") / "t")


def written(folder, name, texts):
    path = folder / name
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def recipe_file(folder, text):
    path = folder / "recipe.toml"
    path.write_text(text)
    return path


def test_a_stage_inherits_what_it_leaves_out(tmp_path):
    file = recipe_file(tmp_path, """
        text = { source = "owner/name", subset = "s", column = "c", length = 64, passkeys = 0.5 }
        [passkeys]
        source = "books.txt"
        length = 256
        min_length = 128
        keys = 3
        [distill]
        tokens = "1M"
        batch_size = 4
        [distill.text]
        length = 2048
        packed = true
        [align.text]
        mix = [{ source = "a.txt", weight = 2 }, { source = "b.jsonl", column = "story" }]
        [gates.passkeys]
        min_length = "none"
        [finetune.passkeys]
        source = "long.txt"
        length = 512""")
    recipe = load_recipe(file)
    distill, align = recipe.rows("distill"), recipe.rows("align")
    assert (distill.source, distill.subset, distill.column) == ("owner/name", "s", "c")
    assert (distill.length, distill.packed, distill.passkeys) == (2048, True, 0.5)
    assert recipe.distill.steps == -(-10**6 // (4 * 2048))
    assert [one.source for one in align.mix] == ["a.txt", "b.jsonl"] and align.length == 64
    assert (align.source, align.subset, align.column) == ("stories", None, "text")
    gates, finetune = recipe.rows("gates"), recipe.rows("finetune")
    assert (gates.min_length, gates.length, gates.source) == (None, 256, "books.txt")
    # books of stage 4 have one length, unless it asks for another
    assert (finetune.min_length, finetune.keys, finetune.length) == (None, 3, 512)
    assert finetune.source == "long.txt" and recipe.passkeys.min_length == 128
    save_recipe(recipe, tmp_path / "again.toml")
    assert load_recipe(tmp_path / "again.toml") == recipe != load_recipe(file, ["seed=1"])
    # what was left to others is found anew when a file changes
    other = load_recipe(file, ["text.column=story", "text.source=mine.jsonl"])
    assert other.rows("distill").source == "mine.jsonl" and other.rows("distill").subset is None
    assert other.rows("distill").column == "story"


def test_changes_reach_a_table_in_a_table():
    recipe = load_recipe("demo", ["distill.text.length=2048", "finetune.text.source=long.txt",
                                  "distill.tokens=1M"])
    assert recipe.rows("distill").length == 2048 and recipe.rows("align").length == 256
    assert recipe.distill.steps == -(-10**6 // (8 * 2048))
    assert recipe.rows("finetune").source == "long.txt" and recipe.rows("finetune").length == 256


@pytest.mark.parametrize("change, words", [
    ("distill.text.lenght=3", "unknown setting distill.text.lenght; did you mean 'length'"),
    ("distill.text.length=1", "distill.text.length: expected an integer >= 2"),
    ("distill.text.passkeys=2", "distill.text.passkeys: expected a number >= 0 and <= 1"),
    ("distill.txt.length=3", "unknown table 'distill.txt'; did you mean 'distill.text'"),
    ("distill.text.a.b=3", "unknown table 'distill.text.a'"),
    ("evaluate.text.length=3", "unknown table 'evaluate.text'"),
    ("distill.text=3", "distill.text: expected a table, got 3"),
    ("align.passkeys.keys=3", "unknown table 'align.passkeys'"),
    ("gates.passkeys.source=", "gates.passkeys.source: expected something"),
    ("reads=3", "unknown key 'reads'"),
])
def test_what_is_wrong_is_named_in_full(change, words):
    with pytest.raises(ValueError, match=words.replace("'", ".")): load_recipe("demo", [change])


@pytest.mark.parametrize("table, words", [
    ({"finetune": {"text": {}, "passkeys": {}}}, r"expected \[finetune.text\] or"),
    ({"gates": {"text": {}}}, r"gates.text: .* expected \[gates.passkeys\]"),
    ({"method": "beam", "budget": 2, "gates": {"passkeys": {"keys": 1}}}, "gates.passkeys: 'beam'"),
])
def test_tables_that_no_stage_reads_are_refused(table, words):
    with pytest.raises(ValueError, match=words): Recipe(**table)


def test_every_stage_reads_its_own(place, tmp_path):
    "Lengths and sources as they come out of the streams; each is tried before anything is spent."
    first, second = (written(tmp_path, f"{word}.jsonl", [f"{word} {i} " * 40 for i in range(60)])
                     for word in ("one", "two"))
    recipe = small_recipe(
        place, text={"length": 64, "source": first}, align={"steps": 2},
        distill={"steps": 2, "text": {"source": second, "length": 96, "passkeys": 0.4}},
        finetune={"steps": 2, "text": {"length": 128, "packed": True}})
    materials = Materials(recipe)
    def text(stage, count=4):
        rows = list(islice(materials.rows(0, stage), count))
        return [len(row["input_ids"]) for row in rows], materials.tokenizer.decode(
            [int(i) for row in rows for i in row["input_ids"]]), rows
    assert text("align")[0] == [64] * 4 and "one" in text("align")[1]
    lengths, words, rows = text("distill", 12)
    # books keep the background of [passkeys]
    texts = [row["input_ids"] for row in rows if not row["answers"].any()]
    assert lengths == [96] * 12 and 0 < len(texts) < 12
    assert all("two" in said and "one" not in said for said in map(
        materials.tokenizer.decode, texts))
    lengths, words, rows = text("finetune")
    assert lengths == [128] * 4 and "one" in words and "position_ids" in rows[0]
    with pytest.raises(ValueError, match="no.txt"):
        convert(small_recipe(place, distill={"steps": 1, "text": {"source": "no.txt"}}),
                tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="finetune.text.length"):
        convert(small_recipe(place, finetune={"steps": 1, "text": {"length": 4096}}),
                tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_held_out_texts_stay_held_out_of_all_sources(place, tmp_path):
    "A document that evaluation reads is in no row of a stage with another source."
    texts = [f"number {i} of all these texts. " * 6 for i in range(80)]
    held = [f"number {i} of" for i, text in enumerate(texts) if is_held_out(text)]
    assert 0 < len(held) < 40
    evaluated = written(tmp_path, "evaluated.jsonl", texts)
    own = written(tmp_path, "own.jsonl", texts[::-1])
    recipe = small_recipe(place, text={"length": 64, "source": evaluated},
                          distill={"text": {"source": own, "passkeys": 0.3, "length": 96}},
                          finetune={"steps": 2, "passkeys": {"source": own}})
    materials = Materials(recipe)
    for stage in ("align", "distill", "finetune"):
        rows = islice(materials.rows(1, stage), 200)
        read = materials.tokenizer.decode([int(i) for row in rows for i in row["input_ids"]])
        assert not any(words in read for words in held) and "number" in read, stage


def test_facts_of_a_stage_have_what_it_reads(place):
    "Nothing new where no stage has rows of its own; else only in the stages from there on."
    base = {"finetune": {"steps": 2}}
    plain = stage_facts(Materials(small_recipe(place, **base)))
    distill = {"steps": 4, "batch_size": 2, "text": {"length": 96}}
    own = stage_facts(Materials(small_recipe(place, distill=distill, **base)))
    assert not any(name.startswith(("distill.text", "the rows of")) for name in
                   plain["finetune-flashmorph"])
    differ = {stage for stage in plain if plain[stage] != own[stage]}
    assert differ == {stage for stage in plain if "distill" in stage or "finetune" in stage}
    assert own["distill-flashmorph"]["distill.text.length"] == 96
    aligned = small_recipe(place, align={"steps": 4, "text": {"length": 96}}, **base)
    facts = stage_facts(Materials(aligned))
    assert "text.length" not in facts["align"] and facts["align"]["align.text.length"] == 96
    assert facts["distill-flashmorph"]["text.length"] == 64
    assert recipe_facts(aligned)["align.text.length"] == 96
    assert "reads" not in recipe_facts(aligned)


def resumed(folder, *changes):
    asked = ["convert", "--resume", "--out", str(folder)]
    for change in changes: asked += ["--set", change]
    return CliRunner().invoke(cli.app, asked, prog_name="flashmorph", env={"COLUMNS": "300"})


def test_rows_of_a_later_stage_may_change_until_it_begins(place, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        convert(small_recipe(place), folder, progress=False, callbacks=[Stop("gates", 2)])
    before = [e for e in events(folder) if e["stage"] == "align"]
    done = resumed(folder, "distill.text.length=96")
    assert done.exit_code == 0, done.output
    assert [e for e in events(folder) if e["stage"] == "align"] == before
    stages = read_json(folder / "run.json", "run")["stages"]
    assert stages["distill-flashmorph"]["distill.text.length"] == 96
    assert stages["align"]["text.length"] == 64
    # as if it had been asked for at once
    convert(load_recipe(folder / "recipe.toml"), tmp_path / "once", progress=False)
    assert events(tmp_path / "once") == events(folder)
    spent = read_json(folder / "results.json", "results")["spent"]
    assert spent["distill-flashmorph"]["tokens"] == 4 * 2 * 96
    done = resumed(folder, "distill.text.length=64")
    assert done.exit_code != 0 and "distill.text.length: 96 then, 64 now" in done.output


def test_the_plan_counts_the_rows_of_each_stage():
    def planned(**tables):
        recipe = small_recipe("bundled", **tables)
        return {s.stage: s for s in plan(recipe, rate=1e9, machine=Machine("cpu")).stages}
    steps = {"steps": 4, "batch_size": 2}
    plain, own = planned(), planned(
        distill={**steps, "text": {"length": 256}}, align={**steps, "text": {"length": 128}},
        gates={**steps, "passkeys": {"length": 96}},
        finetune={**steps, "passkeys": {"length": 512}})
    assert own["distill-flashmorph"].tokens == 4 * 2 * 256 == 4 * plain["distill-flashmorph"].tokens
    assert own["finetune-flashmorph"].tokens == 4 * 2 * 512 and own["gates"].tokens == 4 * 2 * 96
    for stage, more in (("distill-flashmorph", 4), ("align", 2)):
        assert more <= own[stage].flops / plain[stage].flops < 2 * more
        assert own[stage].parts.activations > 1.3 * plain[stage].parts.activations
