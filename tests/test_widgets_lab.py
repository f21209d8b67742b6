"The widgets in a real browser: in JupyterLab with and without a kernel, and on a page."
import json
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from browser import LabPage, chromium, jupyterlab, open_page
from transformers import AutoConfig

from flashmorph.choose.trajectory import GateRun
from flashmorph.results import METRICS, RecallGrid, amount, percent
from flashmorph.selection import Selection, top_k
from flashmorph.show.compare import RecallMap, SelectionCompare
from flashmorph.show.explorer import BudgetExplorer
from flashmorph.show.monitor import GateMonitor
from flashmorph.train.fit import FitConfig

pytestmark = pytest.mark.browser
TUTORIAL = Path(__file__).resolve().parent.parent / "nbs/tutorials/03_budget.ipynb"

# JavaScript: what the explorer shows
SET = """() => [...document.querySelectorAll('.fm-explorer g[data-layer]')]
    .flatMap((g, i) => g.getAttribute('aria-pressed') === 'true' ? [i] : [])"""
BARS = """() => [...document.querySelectorAll('.fm-explorer g[data-layer] rect[data-row="0"]')]
    .flatMap((r, i) => r.classList.contains('full') ? [i] : [])"""
COSTS = "() => [...document.querySelectorAll('.fm-value')].map(e => e.textContent)"
SHARED = """() => [...document.querySelectorAll('.fm-explorer text')].map(t => t.textContent)
    .filter(t => t.includes('shared'))"""
DRAG = """async k => {
    const s = document.querySelector('.fm-explorer .fm-slider'), began = performance.now();
    s.value = k;
    s.dispatchEvent(new Event('input', {bubbles: true}));
    document.querySelector('.fm-chart svg').getBoundingClientRect();
    const took = performance.now() - began;
    s.dispatchEvent(new Event('change', {bubbles: true}));
    return took }"""
HOLD = """ks => {
    const s = document.querySelector('.fm-explorer .fm-slider');
    for (const k of ks) { s.value = k; s.dispatchEvent(new Event('input', {bubbles: true})); }
    s.dispatchEvent(new Event('change', {bubbles: true})) }"""
LINE = "() => document.querySelector('.fm-monitor .fm-line').getAttribute('d')"


def fake_run(L: int, steps: int = 30) -> GateRun:
    speed = torch.rand(L) * 3 - 0.6
    gates = (1 - speed * torch.linspace(0, 1, steps + 1)[:, None]).clamp(0, 1)
    return GateRun(gates, torch.linspace(2, 1, steps).tolist())


def explorer(L: int, **kwargs) -> BudgetExplorer:
    config = AutoConfig.for_model(
        "qwen3", num_hidden_layers=L, hidden_size=64, head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=500)
    return BudgetExplorer(fake_run(L), config=config, **kwargs)


def costs_of(e: BudgetExplorer) -> list[str]:
    "The costs as the explorer should write them."
    return [amount(getattr(e.cost, metric.key), metric.unit) for metric in METRICS]


def page_of(*widgets, path: Path, dark: bool = False) -> str:
    "A page with widgets; returns its address."
    colors = ("#14171a", "#e3e8ee") if dark else ("#fff", "#1f2328")
    style = "background: {}; color: {}".format(*colors)
    body = "".join(f"<h3>{type(w).__name__}</h3>{w.to_html()}" for w in widgets)
    head = '<!doctype html><html><head><meta charset="utf-8"></head>'
    path.write_text(f'{head}<body style="{style}">{body}</body></html>')
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@pytest.mark.parametrize("L", [1, 12, 48, 96])
def test_the_page_selects_as_python_does(browser, tmp_path, L):
    torch.manual_seed(L)
    random.seed(L)
    e = explorer(L)
    page = open_page(browser)
    page.goto(page_of(e, path=tmp_path / "page.html"))
    page.wait_for_selector(".fm-explorer g[data-layer]")
    slowest = 0.0
    for _ in range(25):
        k = random.randint(0, L)
        slowest = max(slowest, page.evaluate(DRAG, k))
        e.budget = k
        assert page.evaluate(SET) == page.evaluate(BARS) == e.layers
        assert page.evaluate(COSTS) == costs_of(e)
        other = {i for i, c in enumerate(e.others[0]["sets"][k]) if c == "1"}
        assert page.evaluate(SHARED) == [f"{len(set(e.layers) & other)} of {k} shared"]
    assert slowest <= 100, f"{slowest:.0f} ms from slider to picture"
    assert not page.problems
    page.context.close()


class PinsOnAPage:
    "An explorer of twelve layers with a budget of four, on a page of its own."
    def __init__(self, browser, folder: Path):
        torch.manual_seed(3)
        self.e = explorer(12, budget=4)
        self.order = self.e.order
        self.page = open_page(browser)
        self.page.goto(page_of(self.e, path=folder / "page.html"))
        self.page.wait_for_selector(".fm-explorer g[data-layer]")

    def layer(self, i: int): return self.page.locator(f'.fm-explorer g[data-layer="{i}"]')

    def expect(self, budget: int = 4, **pins) -> None:
        chosen = top_k(self.order, budget, method="chosen", **pins)
        assert self.page.evaluate(SET) == list(chosen.layers)

    def undo_all(self) -> None:
        while self.page.is_enabled(".fm-undo"): self.page.click(".fm-undo")

    def close(self) -> None:
        assert not self.page.problems
        self.page.context.close()


@pytest.fixture
def pins(browser, tmp_path):
    p = PinsOnAPage(browser, tmp_path)
    yield p
    p.close()


def test_pins_by_clicks_and_keys(pins):
    first, tenth = pins.order[0], pins.order[9]
    pins.layer(tenth).click()
    pins.expect(full=[tenth])
    assert "pinned full" in pins.layer(tenth).get_attribute("aria-label")
    pins.layer(tenth).click()
    pins.expect(linear=[tenth])
    pins.layer(first).focus()
    both = {"full": [first], "linear": [tenth]}
    for key, expected in (("l", {"linear": [first, tenth]}), ("f", both),
                          ("z", {"linear": [first, tenth]}), ("Delete", {"linear": [tenth]}),
                          ("Enter", both)):
        pins.page.keyboard.press(key)
        pins.expect(**expected)
    # arrows move to the neighbour
    step = 1 if first < 11 else -1
    pins.page.keyboard.press("ArrowRight" if step == 1 else "ArrowLeft")
    assert pins.page.evaluate("document.activeElement.dataset.layer") == str(first + step)
    # a layer is pinned full, so 1 is the lowest budget
    pins.page.evaluate(DRAG, 0)
    assert pins.page.evaluate(SET) == [first]
    assert "cannot be lower" in pins.page.locator(".fm-note").first.inner_text()
    pins.page.click(".fm-reset")
    pins.expect()
    pins.undo_all()
    pins.expect()


def test_a_drag_is_one_change(pins):
    pins.page.evaluate(HOLD, [5, 6, 7, 8])
    pins.expect(8)
    pins.page.evaluate(HOLD, [8, 9])
    pins.expect(9)
    pins.page.click(".fm-undo")
    pins.expect(8)
    pins.page.click(".fm-undo")
    pins.expect(4)
    assert pins.page.is_disabled(".fm-undo")


def test_the_slider_and_the_context_by_keys(pins):
    pins.page.locator(".fm-explorer .fm-slider").focus()
    for _ in range(2): pins.page.keyboard.press("ArrowRight")
    pins.expect(6)
    pins.page.fill(".fm-context", "64k")
    pins.page.keyboard.press("Enter")
    pins.e.budget = 6
    before = costs_of(pins.e)
    pins.e.context = 65536
    assert pins.page.evaluate(COSTS) == costs_of(pins.e) != before
    assert pins.page.locator(".fm-commit").count() == 0               # nothing to commit to


@pytest.mark.parametrize("dark", [False, True])
def test_the_others_on_a_page(browser, tmp_path, dark):
    torch.manual_seed(5)
    run = fake_run(12)
    grid = RecallGrid((128, 256), ((1.0, 0.5), (None, 0.25)), ((4, 4), (0, 8)))
    compare = SelectionCompare({"flashmorph": run, "by hand": Selection((0, 1), 12, "x")}, budget=2)
    shown = (GateMonitor.replay(run, 3), compare, RecallMap({"teacher": grid, "hybrid": grid}))
    page = open_page(browser, scheme="dark" if dark else "light")
    page.goto(page_of(*shown, path=tmp_path / "page.html", dark=dark))
    page.wait_for_function("() => document.querySelectorAll('.fm-monitor .fm-line').length === 12")
    # the monitor: a set for each step, and a heat map
    scrub = page.locator(".fm-scrub")
    for n in (30, 0, 7):
        scrub.evaluate("(e, n) => { e.value = n; e.dispatchEvent(new Event('input')) }", n)
        kept = GateRun(run.trajectory[:n + 1]).select(3).layers
        assert page.inner_text(".fm-set") == f"layers {', '.join(map(str, kept))}"
    page.click(".fm-toggle")
    page.wait_for_selector(".fm-monitor image")
    # the methods: a bar for each layer, and two sets of two
    full = "() => [...document.querySelectorAll('.fm-compare rect.full')].length"
    assert page.evaluate(full) == 12 + 2 + 2
    page.locator(".fm-compare .fm-slider").focus()
    page.keyboard.press("ArrowRight")
    assert page.evaluate(full) == 12 + 3
    # the maps
    assert page.locator(".fm-recall-map .fm-cell").count() == 4
    page.click(".fm-recall-map button >> nth=1")
    assert page.get_attribute(".fm-recall-map button >> nth=1", "aria-pressed") == "true"
    assert not page.problems
    page.context.close()


def test_a_page_never_says_that_a_training_runs(browser, tmp_path):
    "What a killed kernel leaves in a notebook."
    m = GateMonitor(show=False)
    m.start("gates", FitConfig(steps=20), [])
    m.step({"step": 1, "loss": 1.0, "gates": [1.0, 0.5]})
    assert m.running
    page = open_page(browser)
    page.goto(page_of(m, path=tmp_path / "page.html"))
    assert page.inner_text(".fm-status") == "gates: step 1 of 20, stopped"
    assert "not final" not in page.inner_text(".fm-monitor")
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_buttons_of_a_figure_keep_to_the_theme(browser, tmp_path, scheme):
    "Plotly paints an active button near white; ours has bold letters instead."
    from flashmorph.show.figures import gates_figure
    path = tmp_path / "figure.html"
    gates_figure(fake_run(4)).write_html(path)
    page = open_page(browser, scheme=scheme)
    page.goto(path.as_uri())
    page.wait_for_selector(".updatemenu-button")
    fills = """() => [...document.querySelectorAll('.updatemenu-item-rect')]
        .map(r => getComputedStyle(r).fillOpacity === '0' || getComputedStyle(r).fill)"""
    bold = """() => [...document.querySelectorAll('.updatemenu-button')]
        .filter(b => b.querySelector('tspan[style*=bold]')).map(b => b.textContent)"""
    assert page.evaluate(fills) == [True, True] and page.evaluate(bold) == ["lines"]
    page.click(".updatemenu-button >> nth=1")
    page.wait_for_selector(".hm")
    page.mouse.move(5, 5)
    assert page.evaluate(fills) == [True, True] and page.evaluate(bold) == ["heat map"]
    page.context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root = tmp_path_factory.mktemp("books")
    shutil.copy(TUTORIAL, root)
    with jupyterlab(root, tmp_path_factory.mktemp("jupyter")) as address: yield root, address


def test_a_reopened_notebook(browser, lab):
    "Outputs of others, no kernel behind them: the slider of the figure still moves the selection."
    _, address = lab
    page = open_page(browser)
    LabPage(page, address(TUTORIAL.name)).open()
    rail = ".js-plotly-plot .slider-rail-touch-rect"
    page.wait_for_selector(rail)
    colors = """() => [...document.querySelector('.js-plotly-plot:has(.slider-rail-touch-rect)')
        .querySelectorAll('.bars .point path')].map(p => getComputedStyle(p).fill)"""
    page.locator(rail).scroll_into_view_if_needed()
    before = page.evaluate(colors)
    box = page.locator(rail).bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    page.wait_for_function(f"before => JSON.stringify(({colors})()) !== before",
                           arg=json.dumps(before, separators=(",", ":")))
    assert not page.problems
    page.context.close()


class Tutorial:
    "Tutorial 03 in JupyterLab, run to its end."
    def __init__(self, page, notebook: LabPage):
        self.page, self.notebook = page, notebook
        notebook.open()
        self.page.evaluate("""() => { window.states = new Set(); new MutationObserver(() => {
            const m = document.querySelector('.fm-monitor');
            const s = m?.querySelector('.fm-status')?.textContent;
            if (s && m.querySelectorAll('.fm-line').length) window.states.add(s);
        }).observe(document.body, {subtree: true, childList: true, characterData: true,
                                   attributes: true}) }""")
        notebook.run_all()
        explorer = ".fm-explorer g[data-layer]"
        self.page.wait_for_selector(explorer, state="attached", timeout=480_000)
        self.page.wait_for_function(f"() => !({notebook.busy()})", timeout=240_000)
        self.page.locator(".fm-explorer").scroll_into_view_if_needed()

    def python(self, expression: str): return self.notebook.kernel(f"explorer.{expression}")

    def agree(self) -> list[int]:
        "The set, which the page and Python agree on once all messages have arrived."
        shown = self.page.evaluate(SET)
        deadline = time.monotonic() + 10
        while self.python("layers") != shown and time.monotonic() < deadline: time.sleep(0.1)
        assert self.python("layers") == shown
        return shown

    def take_pictures(self, folder: str) -> None:
        for theme in ("Light", "Dark"):
            self.page.evaluate("t => jupyterapp.commands.execute('apputils:change-theme', "
                               "{theme: `JupyterLab ${t}`})", theme)
            self.page.wait_for_function(
                "t => document.body.dataset.jpThemeLight === String(t === 'Light')", arg=theme)
            for name in ("monitor", "explorer"):
                self.page.locator(f".fm-{name}").scroll_into_view_if_needed()
                cell = self.page.locator(f".jp-Cell:has(.fm-{name})").last
                cell.screenshot(path=f"{folder}/lab-{name}-{theme.lower()}.png")


def check_the_monitor(t: Tutorial) -> None:
    "It has shown both stages while they ran, and shows their end."
    states = t.page.evaluate("() => [...window.states]")
    assert sum(s.startswith("align") for s in states) >= 2
    assert sum(s.startswith("gates") for s in states) >= 4
    assert states[-1] == "gates: step 40 of 40"


def check_the_slider(t: Tutorial) -> None:
    before = t.agree()
    costs = t.page.evaluate(COSTS)
    t.page.locator(".fm-explorer .fm-slider").focus()
    for _ in range(2): t.page.keyboard.press("ArrowRight")
    t.page.wait_for_function(
        "n => document.querySelector('.fm-count').textContent.startsWith(`${n} of`)",
        arg=len(before) + 2)
    assert len(t.page.evaluate(BARS)) == len(before) + 2 == len(t.agree())
    assert all(a != b for a, b in zip(costs, t.page.evaluate(COSTS), strict=True))
    # a drag is one change for Python as well
    past = len(t.python("history"))
    t.page.evaluate(HOLD, [len(before) + 4, len(before) + 3])
    assert t.agree() and len(t.python("history")) == past + 1


def check_pins_and_recall(t: Tutorial) -> None:
    chosen = t.agree()
    pinned = next(i for i in range(12) if i not in chosen)
    t.page.locator(f'.fm-explorer g[data-layer="{pinned}"]').click()
    layer = "document.querySelector(`.fm-explorer g[data-layer='${i}']`)"
    t.page.wait_for_function(
        f"i => {layer}.getAttribute('aria-label').includes('pinned full')", arg=pinned)
    assert t.python("pinned_full") == [pinned] and t.agree()
    t.page.click(".fm-measure-this")
    measured = "() => document.querySelector('.fm-recall').textContent.includes('%')"
    t.page.wait_for_function(measured, timeout=120_000)
    assert t.page.inner_text(".fm-recall") == percent(t.python("recall"))


def check_the_costs(t: Tutorial) -> None:
    t.page.fill(".fm-context", "5000")
    t.page.keyboard.press("Enter")
    counted = "() => !document.querySelector('.fm-value').textContent.includes('…')"
    t.page.wait_for_function(counted)
    for metric, shown in zip(METRICS, t.page.evaluate(COSTS), strict=True):
        assert shown == amount(t.python(f"cost.{metric.key}"), metric.unit)


def check_the_commit(t: Tutorial, root: Path) -> None:
    t.page.click(".fm-commit")
    note = "document.querySelector('.fm-explorer .fm-note').textContent"
    t.page.wait_for_function(f"() => {note}.startsWith('Committed')")
    saved = Selection.load(root / "runs/my-hybrid")
    assert list(saved.layers) == t.agree() == t.python("hybrid.config.full_layers")
    assert list(saved.pinned_full) == t.python("pinned_full")
    assert saved.digest == t.notebook.kernel("run.digest()") and t.page.is_disabled(".fm-undo")


def check_a_reload(t: Tutorial) -> None:
    "The kernel goes on, and the page shows what it showed before."
    kept = t.agree()
    picture = t.page.evaluate(LINE)
    t.page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    t.page.reload(wait_until="domcontentloaded")
    t.notebook.ready()
    t.page.wait_for_selector(".fm-explorer g[data-layer]", state="attached")
    t.page.wait_for_selector(".fm-monitor .fm-line", state="attached")
    assert t.agree() == kept and t.page.evaluate(LINE) == picture


def test_the_tutorial(browser, lab, request):
    root, address = lab
    page = open_page(browser, height=1400)
    t = Tutorial(page, LabPage(page, address(TUTORIAL.name)))
    check_the_monitor(t)
    check_the_slider(t)
    check_pins_and_recall(t)
    check_the_costs(t)
    check_the_commit(t, root)
    if shots := request.config.getoption("--screenshots"): t.take_pictures(shots)
    check_a_reload(t)
    assert not page.problems
    page.context.close()
