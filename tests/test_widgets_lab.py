"The widgets in a real browser: in JupyterLab with a kernel, in JupyterLab without one, and on a page of their own."
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from browser import LabPage, chromium, jupyterlab, open_page
from transformers import AutoConfig

from flashmorph.choose.gates import GateRun
from flashmorph.results import RecallGrid
from flashmorph.selection import Selection, top_k
from flashmorph.show.compare import RecallMap, SelectionCompare
from flashmorph.show.explorer import BudgetExplorer
from flashmorph.show.monitor import GateMonitor

pytestmark = pytest.mark.browser
TUTORIAL = Path(__file__).resolve().parent.parent / "nbs/tutorials/03_budget.ipynb"

SET = "() => [...document.querySelectorAll('.fm-explorer g[data-layer]')].flatMap((g, i) => g.getAttribute('aria-pressed') === 'true' ? [i] : [])"
BARS = "() => [...document.querySelectorAll('.fm-explorer g[data-layer] rect[data-row=\"0\"]')].flatMap((r, i) => r.classList.contains('full') ? [i] : [])"
COSTS = "() => [...document.querySelectorAll('.fm-value')].map(e => e.textContent)"


def fake_run(L: int, steps: int = 30) -> GateRun:
    speed = torch.rand(L) * 3 - 0.6
    return GateRun((1 - speed * torch.linspace(0, 1, steps + 1)[:, None]).clamp(0, 1), torch.linspace(2, 1, steps).tolist())


def explorer(L: int, **kwargs) -> BudgetExplorer:
    config = AutoConfig.for_model("qwen3", num_hidden_layers=L, hidden_size=64, head_dim=16, num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
    return BudgetExplorer(fake_run(L), config=config, **kwargs)


def page_of(*widgets, path: Path, dark: bool = False) -> str:
    colors = "background: #14171a; color: #e3e8ee" if dark else "background: #fff; color: #1f2328"
    body = "".join(f"<h3>{type(w).__name__}</h3>{w.to_html()}" for w in widgets)
    path.write_text(f'<!doctype html><html><head><meta charset="utf-8"></head><body style="{colors}">{body}</body></html>')
    return path.as_uri()


def drag(page, budget: int) -> float:
    "Move the slider as a hand does; milliseconds until the picture has changed."
    return page.evaluate("""async k => { const s = document.querySelector('.fm-explorer .fm-slider'), began = performance.now(); s.value = k;
        s.dispatchEvent(new Event('input', {bubbles: true})); document.querySelector('.fm-chart svg').getBoundingClientRect();
        const took = performance.now() - began; s.dispatchEvent(new Event('change', {bubbles: true})); return took }""", budget)


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@pytest.mark.parametrize("L", [1, 12, 48, 96])
def test_the_page_selects_as_python_does(browser, tmp_path, L):
    torch.manual_seed(L)
    random.seed(L)
    e, page = explorer(L), open_page(browser)
    page.goto(page_of(e, path=tmp_path / "page.html"))
    page.wait_for_selector(".fm-explorer g[data-layer]")
    slowest = 0.0
    for _ in range(25):
        k = random.randint(0, L)
        slowest = max(slowest, drag(page, k))
        e.budget = k
        assert page.evaluate(SET) == page.evaluate(BARS) == e.layers
        shown = page.evaluate(COSTS)
        assert len(shown) == 4 and shown[0].split()[1] in ("B", "KB", "MB", "GB")
        assert float(shown[3].rstrip("KMB")) * {"K": 1e3, "M": 1e6}[shown[3][-1]] == pytest.approx(e.cost.parameters, rel=0.006)
        shares = page.evaluate("() => [...document.querySelectorAll('.fm-explorer text')].map(t => t.textContent).filter(t => t.includes('shared'))")
        assert shares == [f"{len(set(e.layers) & {i for i, c in enumerate(e.others[0]['sets'][k]) if c == '1'})} of {k} shared"]
    assert slowest <= 100, f"{slowest:.0f} ms from slider to picture"
    assert not page.problems
    page.context.close()


def test_pins_undo_and_keys(browser, tmp_path):
    torch.manual_seed(3)
    e, page = explorer(12, budget=4), open_page(browser)
    page.goto(page_of(e, path=tmp_path / "page.html"))
    page.wait_for_selector(".fm-explorer g[data-layer]")
    order, first = e.order, e.layers
    def layer(i): return page.locator(f'.fm-explorer g[data-layer="{i}"]')
    def expect(**pins): assert page.evaluate(SET) == list(top_k(order, 4, method="", **pins).layers)
    layer(order[9]).click(); expect(full=[order[9]])
    assert "pinned full" in layer(order[9]).get_attribute("aria-label")
    layer(order[9]).click(); expect(linear=[order[9]])
    layer(order[0]).focus()
    for press, pins in (("l", dict(linear=[order[0], order[9]])), ("f", dict(full=[order[0]], linear=[order[9]])), ("z", dict(linear=[order[0], order[9]])),
                        ("Delete", dict(linear=[order[9]])), ("Enter", dict(full=[order[0]], linear=[order[9]]))):
        page.keyboard.press(press); expect(**pins)
    page.keyboard.press("ArrowRight" if order[0] < 11 else "ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.layer") == str(order[0] + (1 if order[0] < 11 else -1))
    drag(page, 0)                                                       # a layer is pinned full: 1 is as low as it goes
    assert page.evaluate(SET) == [order[0]] and "cannot be lower" in page.locator(".fm-note").first.inner_text()
    page.click(".fm-reset"); assert page.evaluate(SET) == first
    for _ in range(9): page.click(".fm-undo", force=True, no_wait_after=True) if page.is_enabled(".fm-undo") else None
    assert page.evaluate(SET) == first and page.is_disabled(".fm-undo")
    slider = page.locator(".fm-explorer .fm-slider"); slider.focus()
    page.keyboard.press("ArrowRight"); page.keyboard.press("ArrowRight")
    assert page.evaluate(SET) == list(top_k(order, 6, method="").layers)
    before = page.evaluate(COSTS)
    page.fill(".fm-context", "64k"); page.keyboard.press("Enter")
    e.budget, e.context = 6, 65536
    assert page.evaluate(COSTS) != before and page.input_value(".fm-context") in ("64k", "65,536")
    assert page.evaluate(COSTS)[0] == f"{e.cost.cache_bytes / 1e6:.3g} MB" or e.cost.cache_bytes < 1e6
    assert page.locator(".fm-commit").count() == 0                      # nothing to commit to
    assert not page.problems
    page.context.close()


@pytest.mark.parametrize("dark", [False, True])
def test_the_others_on_a_page(browser, tmp_path, dark):
    torch.manual_seed(5)
    run, grid = fake_run(12), RecallGrid((128, 256), ((1.0, 0.5), (None, 0.25)), ((4, 4), (0, 8)))
    compare = SelectionCompare({"flashmorph": run, "by hand": Selection((0, 1), 12, "x")}, budget=2)
    page = open_page(browser, scheme="dark" if dark else "light")
    page.goto(page_of(GateMonitor.replay(run, 3), compare, RecallMap({"teacher": grid, "hybrid": grid}), path=tmp_path / "page.html", dark=dark))
    page.wait_for_function("() => document.querySelectorAll('.fm-monitor .fm-line').length === 12")
    scrub = page.locator(".fm-scrub")
    for n in (30, 0, 7):
        scrub.evaluate("(e, n) => { e.value = n; e.dispatchEvent(new Event('input')) }", n)
        kept = GateRun(run.trajectory[:n + 1]).select(3).layers
        assert page.inner_text(".fm-set") == f"layers {', '.join(map(str, kept))}"
    page.click(".fm-toggle"); page.wait_for_selector(".fm-monitor image")
    full = "() => [...document.querySelectorAll('.fm-compare rect.full')].length"
    assert page.evaluate(full) == 12 + 2 + 2                            # a bar for each layer, and two sets of two
    page.locator(".fm-compare .fm-slider").focus(); page.keyboard.press("ArrowRight")
    assert page.evaluate(full) == 12 + 3
    assert page.locator(".fm-recall-map .fm-cell").count() == 4
    page.click(".fm-recall-map button >> nth=1")
    assert page.get_attribute(".fm-recall-map button >> nth=1", "aria-pressed") == "true"
    assert not page.problems
    page.context.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    root, scratch = tmp_path_factory.mktemp("books"), tmp_path_factory.mktemp("jupyter")
    shutil.copy(TUTORIAL, root)
    with jupyterlab(root, scratch) as address: yield root, address


def test_a_reopened_notebook(browser, lab):
    "Outputs of others, no kernel behind them: the slider of the figure still moves the selection."
    _, address = lab
    page = open_page(browser)
    LabPage(page, address(TUTORIAL.name)).open()
    page.wait_for_selector(".js-plotly-plot .slider-rail-touch-rect")
    colors = """() => [...document.querySelector('.js-plotly-plot:has(.slider-rail-touch-rect)').querySelectorAll('.bars .point path')]
        .map(p => getComputedStyle(p).fill)"""
    page.locator(".js-plotly-plot .slider-rail-touch-rect").scroll_into_view_if_needed()
    before, box = page.evaluate(colors), page.locator(".js-plotly-plot .slider-rail-touch-rect").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.9, box["y"] + box["height"] / 2)
    page.wait_for_function(f"before => JSON.stringify(({colors})()) !== before", arg=json.dumps(before, separators=(",", ":")))
    assert not page.problems
    page.context.close()


def test_the_tutorial(browser, lab, request):
    root, address = lab
    page = open_page(browser, height=1400)
    notebook = LabPage(page, address(TUTORIAL.name))
    notebook.open()
    page.evaluate("""() => { window.states = new Set(); new MutationObserver(() => {
        const m = document.querySelector('.fm-monitor'), s = m?.querySelector('.fm-status')?.textContent;
        if (s?.startsWith('gates') && m.querySelectorAll('.fm-line').length) window.states.add(s);
    }).observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true}) }""")
    notebook.run_all()
    page.wait_for_selector(".fm-monitor", state="attached", timeout=240_000)                 # the branches are aligned before
    page.wait_for_function("() => window.states.size >= 5", timeout=240_000)
    page.wait_for_selector(".fm-explorer g[data-layer]", state="attached", timeout=240_000)
    page.wait_for_function(f"() => !({notebook.busy()})", timeout=240_000)
    page.locator(".fm-explorer").scroll_into_view_if_needed()
    assert page.evaluate(SET) == notebook.kernel("explorer.layers")
    assert page.evaluate("() => [...window.states].at(-1)").startswith("gates: step 40 of 40")

    costs, before = page.evaluate(COSTS), page.evaluate(SET)
    page.locator(".fm-explorer .fm-slider").focus()
    for _ in range(2): page.keyboard.press("ArrowRight")
    page.wait_for_function("n => document.querySelector('.fm-count').textContent.startsWith(`${n} of`)", arg=len(before) + 2)
    assert len(page.evaluate(BARS)) == len(before) + 2 and all(a != b for a, b in zip(costs, page.evaluate(COSTS)))
    assert page.evaluate(SET) == notebook.kernel("explorer.layers")

    chosen = page.evaluate(SET)
    pinned = next(i for i in range(12) if i not in chosen)
    page.locator(f'.fm-explorer g[data-layer="{pinned}"]').click()
    page.wait_for_function("i => document.querySelector(`.fm-explorer g[data-layer='${i}']`).getAttribute('aria-label').includes('pinned full')", arg=pinned)
    assert notebook.kernel("explorer.pinned_full") == [pinned] and notebook.kernel("explorer.layers") == page.evaluate(SET)

    page.click(".fm-measure-this")
    page.wait_for_function("() => document.querySelector('.fm-recall').textContent.includes('%')", timeout=120_000)
    assert page.inner_text(".fm-recall") == f"{100 * notebook.kernel('explorer.recall'):.1f} %"

    page.fill(".fm-context", "5000"); page.keyboard.press("Enter")
    page.wait_for_function("() => !document.querySelector('.fm-value').textContent.includes('…')")
    assert page.evaluate(COSTS)[3] == f"{notebook.kernel('explorer.cost.parameters') / 1e3:.0f} K"

    page.click(".fm-commit")
    page.wait_for_function("() => document.querySelector('.fm-explorer .fm-note').textContent.startsWith('Committed')")
    saved = Selection.load(root / "runs/my-hybrid")
    assert list(saved.layers) == page.evaluate(SET) == notebook.kernel("explorer.hybrid.config.full_layers")
    assert saved.pinned_full == (pinned,) and saved.digest == notebook.kernel("run.digest()") and page.is_disabled(".fm-undo")
    kept, picture = page.evaluate(SET), page.evaluate("() => document.querySelector('.fm-monitor .fm-line').getAttribute('d')")
    if shots := request.config.getoption("--screenshots"):
        for theme in ("Light", "Dark"):
            page.evaluate("t => jupyterapp.commands.execute('apputils:change-theme', {theme: `JupyterLab ${t}`})", theme)
            page.wait_for_function("t => document.body.dataset.jpThemeLight === String(t === 'Light')", arg=theme)
            for name in ("monitor", "explorer"):
                page.locator(f".fm-{name}").scroll_into_view_if_needed()
                page.locator(f".jp-Cell:has(.fm-{name})").last.screenshot(path=f"{shots}/lab-{name}-{theme.lower()}.png")

    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.reload(wait_until="domcontentloaded")
    notebook.ready()
    page.wait_for_selector(".fm-explorer g[data-layer]", state="attached")
    page.wait_for_selector(".fm-monitor .fm-line", state="attached")
    assert page.evaluate(SET) == kept and page.evaluate("() => document.querySelector('.fm-monitor .fm-line').getAttribute('d')") == picture
    assert notebook.kernel("explorer.layers") == kept
    assert not page.problems
    page.context.close()
