"report.html: whole for a whole run, honest about a broken one, closed to what files may contain."
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browser import chromium, open_page
from rich.console import Console
from transformers import Qwen3Config

from flashmorph.choose.trajectory import GateRun
from flashmorph.model.hybrid import HybridConfig
from flashmorph.selection import Selection
from flashmorph.show.report import write_report
from flashmorph.show.table import results_table, spent_table
from flashmorph.store import EventLog

EVIL = ("</script></pre><script>window.bad = 1</script><img src=x onerror='window.bad = 1'>"
        "<b>&amp;[red]")
SCORES = {"recall": 0.5, "exact": 0.25, "answer_nll": 1.5, "lm_nll": 2.5, "books": 4, "length": 64}


def make_results(L: int, text: str = "plain") -> dict:
    "The results of a finished run; `text` stands wherever a file may hold text of others."
    kept = list(range(0, L, 4))
    models = {}
    for name in ("teacher", "all_linear", "uniform", "flashmorph", text):
        models[name] = {"zero_shot": SCORES, "parameters": 10_000, "cache_bytes": 4096}
        if name != "teacher": models[name] |= {"distilled": SCORES, "finetuned": SCORES}
    return {"budget": len(kept), "layers": kept, "num_layers": L, "teacher": text, "mixer": text,
            "selections": {"uniform": kept, "flashmorph": kept, "all_linear": [], text: [0]},
            "context": 64, "seconds": {"align": 3.0, text: 4.0}, "models": models}


def make_run(folder: Path, L: int, text: str = "plain") -> Path:
    "A finished run of L layers."
    folder.mkdir()
    results = make_results(L, text)
    (folder / "results.json").write_text(json.dumps(results))
    GateRun(torch.rand(31, L), [1.0] * 30, {"note": text}).save(folder)
    Selection(tuple(results["layers"]), L, "flashmorph", [0.5] * L).save(folder)
    teacher = Qwen3Config(num_hidden_layers=L, hidden_size=16, intermediate_size=24, head_dim=8,
                          num_attention_heads=2, num_key_value_heads=1, vocab_size=61)
    config = HybridConfig(teacher=teacher, full_layers=results["layers"])
    config.save_pretrained(folder / "hybrid")
    log = EventLog(folder / "log.jsonl")
    for stage in ("align", "gates", text):
        for step in range(1, 20):
            log.append({"stage": stage, "step": step, "loss": 1 / step, "note": text})
    (folder / "recipe.toml").write_text(f"teacher = '''{text}'''\n")
    return folder


class Tags(HTMLParser):
    "Elements of a page, and its headings and notes."
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.inside = [], []
        self.scripts, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.inside: return
        while self.inside.pop() != tag: pass

    def handle_data(self, data):
        in_script = self.inside and self.inside[-1] == "script"
        (self.scripts if in_script else self.text).append(data)

    def count(self, tag): return sum(name == tag for name, _ in self.tags)


def left_out(page: str) -> list[str]:
    "The sections that a report leaves out."
    return re.findall(r'class="missing">([\w ]+) left out', page)


@pytest.mark.parametrize("L", [1, 12, 96])
def test_a_whole_run(tmp_path, L):
    page = write_report(make_run(tmp_path / "run", L)).read_text()
    tags = Tags(page)
    assert tags.count("h2") == 7 and tags.count("script") == 1 + 5 and not left_out(page)
    assert sum(len(s) > 1_000_000 for s in tags.scripts) == 1  # plotly, once
    loaded = [attrs for _, attrs in tags.tags if attrs.keys() & {"src", "href", "data", "action"}]
    assert not loaded
    assert len(page) < 6_000_000 and str(tmp_path) not in page


def test_every_stage_is_shown(tmp_path):
    "Stage 4 too, and a stage that this version does not know: in the table, figure and summary."
    folder = make_run(tmp_path / "run", 6)
    results = make_results(6)
    recalls = {"zero_shot": 0.11, "distilled": 0.22, "finetuned": 0.33, "pruned_more": 0.44}
    for stage, recall in recalls.items():
        results["models"]["flashmorph"][stage] = {**SCORES, "recall": recall}
    (folder / "results.json").write_text(json.dumps(results))
    page = write_report(folder).read_text()
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(results_table(results))
    terminal = console.export_text()
    names = ("zero-shot", "distilled", "finetuned", "pruned more")
    for name, recall in zip(names, recalls.values(), strict=True):
        share = f"{100 * recall:.1f}%"
        assert f"<b>{share}</b><span>recall of the hybrid, {name}</span>" in page
        assert f"<td>{share}</td>" in page and f'"name": "{name}"' in page
        assert re.search(rf"{name} .* {share}", terminal)


BROKEN = {
    "recipe.toml": {"Recipe"}, "gates.json": {"Gates", "Costs"}, "log.jsonl": {"Losses"},
    "selection.json": {"Layers"}, "hybrid/config.json": {"Costs"},
    "results.json": {"Summary", "Results", "Layers", "What it took", "Costs"}}
DEEP = "[" * 100_000


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("how", ["missing", "cut", "foreign", "deep", "bytes", "empty"])
def test_a_broken_piece_costs_only_its_sections(tmp_path, name, how):
    folder = make_run(tmp_path / "run", 6)
    file = folder / name
    text = file.read_text()
    if how == "missing": file.unlink()
    elif how == "bytes": file.write_bytes(b"\xff\xfe\x00")
    else:
        changed = {"cut": text[:len(text) // 2], "foreign": "[1, 2, 3]", "deep": DEEP, "empty": ""}
        file.write_text(changed[how])
    page = write_report(folder).read_text()
    expected = BROKEN[name]
    # any text is shown as a recipe, and half a log as a log
    if name == "recipe.toml" and how not in ("missing", "bytes"): expected = set()
    if name == "log.jsonl" and how == "cut": expected = set()
    if how == "missing" and name in ("selection.json", "results.json"):
        expected = expected - {"Layers"}                          # each knows layers of its own
    assert set(left_out(page)) == expected
    assert str(tmp_path) not in page
    for line in re.findall(r'<p class="missing">(.*)', page): assert line.endswith(".</p>"), line


@pytest.mark.parametrize("change", [
    {"models": {"x": 3}}, {"models": 3}, {"seconds": [1]}, {"layers": 3}, {"selections": [1]},
    {"spent": [1]}, {"spent": {"align": 3}},
    {"models": {"flashmorph": {"zero_shot": [1]}}}, {"context": "long"}, {"num_layers": "many"},
    {"selections": {"uniform": [99]}}, {"models": {"teacher": {"zero_shot": {"recall": "high"}}}}])
def test_results_of_another_shape(tmp_path, change):
    "The table refuses them in one line or shows a dash; the report is written in any case."
    folder = make_run(tmp_path / "run", 6)
    results = {**make_results(6), **change}
    (folder / "results.json").write_text(json.dumps(results))
    page = write_report(folder).read_text()
    assert {"Gates", "Losses", "Recipe"}.isdisjoint(left_out(page))
    try: results_table(results)
    except ValueError as error: assert str(error).startswith("results: ")


@pytest.mark.parametrize("change", [
    {"num_hidden_layers": "many"}, {"hidden_size": -4}, {"model_type": "nothing"},
    {"num_hidden_layers": 5}])
def test_a_strange_hybrid_costs_only_the_costs(tmp_path, change):
    folder = make_run(tmp_path / "run", 6)
    path = folder / "hybrid/config.json"
    config = json.loads(path.read_text())
    # the outer configuration repeats what the teacher's says, and the outer value counts
    outer = {key: value for key, value in change.items() if key in config and key != "model_type"}
    path.write_text(json.dumps({**config, **outer, "teacher": {**config["teacher"], **change}}))
    assert left_out(write_report(folder).read_text()) == ["Costs"]


def test_text_from_files_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", 6, EVIL)
    page = write_report(folder.rename(tmp_path / "a<img src=x>&b")).read_text()
    tags = Tags(page)
    assert tags.count("script") == 1 + 5 and not tags.count("img")
    assert tags.count("b") == page.count('<div class="card"><b>')
    assert EVIL in "".join(tags.text) and "window.bad = 1<" not in "".join(tags.scripts)
    # what plotly takes for markup is escaped for plotly as well
    labels = "".join(s for s in tags.scripts if len(s) < 1_000_000)
    assert "\\u003cscript" not in labels and "\\u003cimg" not in labels


def test_terminal_table_takes_text_as_text():
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(results_table(make_results(6, EVIL)))
    text = console.export_text()
    assert "[red]" in text
    assert [text.count(s) for s in ("zero-shot", "distilled", "finetuned")] == [5, 4, 4]


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(tmp_path, scheme, request):
    path = write_report(make_run(tmp_path / "run", 12, EVIL))
    with chromium() as browser:
        page = open_page(browser, width=1100, height=900, scheme=scheme)
        page.goto(path.as_uri())
        drawn = "document.querySelectorAll('.js-plotly-plot .main-svg').length >= 5"
        page.wait_for_function(drawn)
        assert page.evaluate("window.bad") is None and not page.problems
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
        if shots := request.config.getoption("--screenshots"):
            page.screenshot(path=f"{shots}/report-{scheme}.png", full_page=True)


def test_what_it_took(tmp_path):
    "A row for each stage in the report and in the terminal; runs of earlier versions have times."
    folder = make_run(tmp_path / "run", 6)
    page = write_report(folder).read_text()
    assert "align</td><td>—</td><td>—</td><td>3.0 s</td><td>—" in page
    taken = {"tokens": 90_000, "tokens_s": 30_000.0, "seconds": 3.0, "peak_memory": 1.2e9}
    results = {**make_results(6), "spent": {"align": taken}}
    (folder / "results.json").write_text(json.dumps(results))
    page = write_report(folder).read_text()
    assert "align</td><td>90K</td><td>30K</td><td>3.0 s</td><td>1.2 GB" in page
    assert "all</td><td>90K</td><td>—</td><td>7.0 s</td><td>1.2 GB" in page
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(spent_table(results))
    assert re.search(r"align +90K +30K +3.0 s +1.2 GB", console.export_text())
