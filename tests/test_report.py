"report.html: whole for a whole run, honest about a broken one, and closed to whatever the files of a run may contain."
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from flashmorph.store import EventLog
from flashmorph.choose.gates import GateRun
from flashmorph.model.hybrid import HybridConfig
from flashmorph.show.report import results_table, write_report
from flashmorph.selection import Selection

EVIL = "</script></pre><script>window.bad = 1</script><img src=x onerror='window.bad = 1'><b>&amp;[red]"


def make_run(folder: Path, L: int, text: str = "plain") -> Path:
    "A finished run of L layers; `text` stands wherever a file may hold text of others."
    folder.mkdir()
    kept, sets = list(range(0, L, 4)), {"uniform": list(range(0, L, 4)), "flashmorph": list(range(0, L, 4)), "all_linear": [], text: [0]}
    scores = {"recall": 0.5, "exact": 0.25, "answer_nll": 1.5, "lm_nll": 2.5, "books": 4, "length": 64}
    names = ["teacher", "all_linear", "uniform", "flashmorph", text]
    models = {n: {"zero_shot": scores, **({} if n == "teacher" else {"distilled": scores}), "parameters": 10_000, "cache_bytes": 4096} for n in names}
    results = {"budget": len(kept), "layers": kept, "num_layers": L, "selections": sets, "teacher": text, "mixer": text, "context": 64,
               "seconds": {"align": 3.0, text: 4.0}, "models": models}
    (folder / "results.json").write_text(json.dumps(results))
    GateRun(torch.rand(31, L), [1.0] * 30, {"note": text}).save(folder)
    Selection(tuple(kept), L, "flashmorph", [0.5] * L).save(folder)
    teacher = Qwen3Config(num_hidden_layers=L, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=61)
    HybridConfig(teacher=teacher, full_layers=kept).save_pretrained(folder / "hybrid")
    for stage in ("align", "gates", text):
        for step in range(1, 20): EventLog(folder / "log.jsonl").append({"stage": stage, "step": step, "loss": 1 / step, "note": text})
    (folder / "recipe.toml").write_text(f"teacher = '''{text}'''\n")
    return folder


class Tags(HTMLParser):
    "Elements of a page, and its headings and notes."
    def __init__(self, page: str):
        super().__init__()
        self.tags, self.scripts, self.text, self._in = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs))); self._in.append(tag)
    def handle_endtag(self, tag): self._in = self._in[:len(self._in) - 1 - self._in[::-1].index(tag)] if tag in self._in else self._in
    def handle_data(self, data): (self.scripts if self._in and self._in[-1] == "script" else self.text).append(data)

    def count(self, tag): return sum(name == tag for name, _ in self.tags)


@pytest.mark.parametrize("L", [1, 12, 96])
def test_a_whole_run(tmp_path, L):
    page = write_report(make_run(tmp_path / "run", L)).read_text()
    tags = Tags(page)
    assert tags.count("h2") == 7 and tags.count("script") == 1 + 5 and "left out" not in page
    assert sum(len(s) > 1_000_000 for s in tags.scripts) == 1  # plotly, once
    assert not [attrs for _, attrs in tags.tags if attrs.keys() & {"src", "href", "data", "action"}]
    assert len(page) < 6_000_000 and str(tmp_path) not in page


@pytest.mark.parametrize("name, sections", [
    ("recipe.toml", {"Recipe"}), ("gates.json", {"Gates", "Costs"}), ("log.jsonl", {"Losses"}), ("selection.json", set()),
    ("hybrid/config.json", {"Costs"}), ("results.json", {"Summary", "Results", "Time", "Costs"})])
@pytest.mark.parametrize("how", ["missing", "cut", "foreign"])
def test_a_broken_piece_costs_only_its_section(tmp_path, name, sections, how):
    folder = make_run(tmp_path / "run", 6)
    file = folder / name
    if how == "missing": file.unlink()
    if how == "cut": file.write_text(file.read_text()[:len(file.read_text()) // 2])
    if how == "foreign": file.write_text("[1, 2, 3]")
    if how == "cut" and name == "log.jsonl" or how != "missing" and name == "recipe.toml": sections = set()  # half a log, and any text, can be shown
    if how != "missing" and name in ("selection.json", "results.json"): sections = sections | ({"Layers"} if name == "selection.json" else set())
    page = write_report(folder).read_text()
    assert set(re.findall(r'class="missing">(\w+) left out', page)) == sections
    assert str(tmp_path) not in page


@pytest.mark.parametrize("change", [{"num_hidden_layers": "many"}, {"hidden_size": -4}, {"model_type": "nothing"}, {"num_hidden_layers": 5}])
def test_a_strange_hybrid_costs_only_the_costs(tmp_path, change):
    folder = make_run(tmp_path / "run", 6)
    config = json.loads((folder / "hybrid/config.json").read_text())
    (folder / "hybrid/config.json").write_text(json.dumps({**config, "teacher": {**config["teacher"], **change}}))
    assert re.findall(r'class="missing">(\w+) left out', write_report(folder).read_text()) == ["Costs"]


def test_text_from_files_stays_text(tmp_path):
    folder = make_run(tmp_path / "run", 6, EVIL)
    page = write_report(folder.rename(tmp_path / "a<img src=x>&b")).read_text()
    tags = Tags(page)
    assert tags.count("script") == 1 + 5 and not tags.count("img") and not tags.count("b") - page.count('<div class="card"><b>')
    assert EVIL in "".join(tags.text) and "window.bad = 1<" not in "".join(tags.scripts)
    labels = "".join(s for s in tags.scripts if len(s) < 1_000_000)
    assert "\\u003cscript" not in labels and "\\u003cimg" not in labels  # what plotly takes for markup is escaped for it as well


def test_terminal_table_takes_text_as_text(tmp_path):
    from rich.console import Console
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    console.print(results_table(json.loads((make_run(tmp_path / "run", 6, EVIL) / "results.json").read_text())))
    text = console.export_text()
    assert "[red]" in text and text.count("zero-shot") == 5 and text.count("distilled") == 4


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(tmp_path, scheme):
    sync_api = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")): pytest.skip("no chromium")
    path, problems = write_report(make_run(tmp_path / "run", 12, EVIL)), []
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": 1100, "height": 900})
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file://", "data:", "blob:")) or problems.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 5")
        assert page.evaluate("window.bad") is None and not problems
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 26)")
        browser.close()
