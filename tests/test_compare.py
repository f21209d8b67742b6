"Selectors side by side: the planted teachers, a killed comparison, strict files, errors."
import json
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

from flashmorph.run.asking import CompareConfig
from flashmorph.run.compare import compare_selections
from flashmorph.scores import read_selections
from flashmorph.show.compare import load_selections

# What keeps each planted teacher working at two layers: one that looks back and one that recalls.
NEEDED = {name: (set(back), set(recall)) for name, (_, _, back, recall) in zoo.PLANTED.items()}


def compared(name: str, *methods: str, **settings):
    "A comparison of selectors on a planted teacher, of budget 2, on few books."
    model, _ = zoo.morphable(name)

    def rows(seed: int) -> zoo.Task: return zoo.Task(seed=1000 + seed)
    settings = {"budgets": (2,), "count": 16, "interactions": False, "reach": 1, **settings}
    return compare_selections(model, rows, rows(10**6), methods=methods, **settings)


def works(name: str, layers: tuple[int, ...]) -> bool:
    back, recall = NEEDED[name]
    return bool(back & {*layers}) and bool(recall & {*layers})


def test_isolated_scores_fail_where_layers_stand_in_for_each_other():
    "Of two chains none is missed alone and none helps alone; sets that are tried keep a chain."
    shown = compared("chains", "remove-one", "add-one", "eliminate", "swap")
    found = {one.method: one for one in shown.kept}
    assert works("chains", shown.subsets[0].layers)
    assert works("chains", found["eliminate"].layers)
    assert works("chains", found["swap"].layers)
    assert not works("chains", found["remove-one"].layers)
    assert not works("chains", found["add-one"].layers)
    assert found["eliminate"].regret < 0.5 < found["remove-one"].regret


def test_a_killed_comparison_goes_on(tmp_path):
    "A process that is killed in the middle leaves measurements that the next one uses."
    log = tmp_path / "compare.jsonl"
    program = ("import os, sys; sys.path.insert(0, 'tests'); import test_compare as t\n"
               "def say(line):\n    if line.startswith('all '): os._exit(9)\n"
               f"t.compared('pair', 'remove-one', log={str(log)!r}, say=say)")
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 9
    before = log.read_text()
    assert before.count('"asked') == 1
    shown = compared("pair", "remove-one", log=log)
    assert log.read_text().startswith(before) and log.read_text().count('"asked') == 1
    again = compared("pair", "remove-one", log=log)
    assert again == shown


def test_a_comparison_that_is_killed_in_a_selector_goes_on(tmp_path):
    "What the selector has measured is not measured again; when it has answered, its folder goes."
    log = tmp_path / "compare.jsonl"
    program = ("import os, sys; sys.path.insert(0, 'tests'); import test_compare as t\n"
               "from flashmorph.store import EventLog\n"
               "append, left = EventLog.append, iter(range(5))\n"
               "def some(self, event):\n"
               "    if 'books' in event and next(left, None) is None: os._exit(9)\n"
               "    append(self, event)\n"
               "EventLog.append = some\n"
               f"t.compared('pair', 'remove-one', log={str(log)!r})")
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root).returncode == 9
    [place] = (tmp_path / "compare").iterdir()
    assert place.name.startswith("remove-one-0-")
    known = (place / "asked.jsonl").read_text()
    assert known.count('"books"') == 5 and not log.exists()
    shown = compared("pair", "remove-one", log=log)
    assert shown.kept == compared("pair", "remove-one").kept
    assert [path.name for path in tmp_path.iterdir()] == ["compare.jsonl"]


def test_files_are_read_strictly(tmp_path):
    shown = compared("pair", "remove-one", most=0)
    record = json.loads(json.dumps(shown.record()))
    assert read_selections(record) == shown
    for change in ({"kept": None}, {"num_layers": 3}, {"more": 1}, {"knee": [1.5, 2, 3]}):
        with pytest.raises(ValueError, match="flashmorph compare"):
            read_selections({**record, **change})
    with pytest.raises(ValueError, match="a comparison of selections"):
        load_selections(tmp_path)


@pytest.mark.parametrize("change, words", [
    ({"methods": ("remove-on",)}, "did you mean 'remove-one'"),
    ({"budgets": ()}, "at least one"),
    ({"seeds": 0}, "seeds"),
])
def test_wrong_settings_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        CompareConfig(**{"methods": ("remove-one",), "budgets": (2,)} | change)
