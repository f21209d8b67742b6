"""The built site in a real browser, over http and from files.

All pages can be reached, no link is broken, and nothing is asked of other machines."""
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from browser import chromium, open_page
from notebooks import CHAPTERS, NOT_YET, is_imports, lines_of

import flashmorph

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
SITE = ROOT / "docs/_build/html"
PACKAGES = ["", "ops", "data", "model", "train", "measure", "choose", "show", "run", "serve"]
SHELVES = ["Store and nouns", "Ops", "Data", "Model", "Training", "Measuring", "Choosing",
           "Showing", "Running", "Serving"]
DRAWN = """count => {
    const drawn = (figure) =>
        figure.querySelector('.trace, .hm') &&
        figure.querySelector('.cartesianlayer').getBoundingClientRect().width > 99;
    return [...document.querySelectorAll('div.figure')].filter(drawn).length === count;
}"""
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Path:
    "The site as it is built from what stands here now."
    command = [sys.executable, ROOT / "docs/build.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


@pytest.fixture(scope="module")
def browser():
    with chromium() as running: yield running


class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves files and logs nothing."

    def log_message(self, *args): pass


@pytest.fixture(params=["http", "file"])
def address(request, site) -> Iterator[str]:
    "Where the site is, with a slash at the end."
    if request.param == "file":
        yield site.as_uri() + "/"
        return
    handler = functools.partial(Quiet, directory=site)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


def refused(page, response) -> None:
    if response.status >= 400: page.problems.append(f"{response.status} for {response.url}")


@pytest.fixture
def tab(browser, address):
    "A page on which nothing may go wrong, and that may ask nothing of other machines."
    page = open_page(browser, width=1440)
    page.on("response", functools.partial(refused, page))
    yield page
    page.context.close()
    assert not page.problems


def pages(site: Path) -> list[Path]:
    "Every page of the site."
    return [path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts]


# What a page looks like, in one walk over all of them

SIDEBAR = """() => [...document.querySelectorAll('.sidebar-tree .caption')].map((caption) =>
    [caption.innerText, [...caption.nextElementSibling.querySelectorAll('a')].map((a) => a.href)])
"""
ENTRIES = """() => [...document.querySelectorAll('dl.py > dd')].map((text) => ({
    signature: [...text.parentElement.querySelectorAll(':scope > dt .sig-param')]
        .map((parameter) => parameter.querySelector('.n')?.innerText),
    name: text.previousElementSibling.id,
    linked: [...text.querySelectorAll('a.reference code')]
        .filter((code) => code.closest('dd') === text).map((code) => code.innerText),
}))"""
ROOM = """() => {
    document.querySelectorAll('details').forEach((details) => { details.open = true; });
    const columns = (block) => {
        const probe = Object.assign(document.createElement('span'), {textContent: 'x'.repeat(100)});
        const style = getComputedStyle(block);
        const padding = parseFloat(style.paddingLeft) + parseFloat(style.paddingRight);
        block.append(probe);
        const column = probe.getBoundingClientRect().width / 100;
        probe.remove();
        return (block.clientWidth - padding) / column;
    };
    return [...document.querySelectorAll('div.cell_input pre')].map(columns);
}"""
CUT = """() => {
    document.querySelectorAll('details').forEach((details) => { details.open = true; });
    return [...document.querySelectorAll('pre')]
        .filter((block) => block.scrollWidth > block.clientWidth)
        .map((block) => block.innerText.split('\\n').reduce((a, b) => a.length < b.length ? b : a));
}"""
OVERFLOWS = "() => document.documentElement.scrollWidth > document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def looks(browser, site) -> dict[Path, dict]:
    "Of every page, at 1,300 pixels and on a phone: what the tests below ask of it."
    window = open_page(browser, width=1300)
    found = {}
    for page in pages(site):
        window.set_viewport_size({"width": 1300, "height": 900})
        window.goto(page.as_uri())
        look = {"entries": window.evaluate(ENTRIES), "sidebar": window.evaluate(SIDEBAR)}
        look |= {"overflows": [window.evaluate(OVERFLOWS)], "room": window.evaluate(ROOM)}
        look["cut"] = window.evaluate(CUT)
        window.set_viewport_size({"width": 390, "height": 900})
        look["overflows"].append(window.evaluate(OVERFLOWS))
        found[page] = look
    assert not window.problems
    window.context.close()
    return found


# Links

def without_scripts(text: str) -> str:
    "HTML whose scripts are empty: their text is data, not links."
    return re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", text, flags=re.S)


def links(page: Path) -> tuple[set[str], set[str]]:
    "Addresses that a page links to or loads, and the anchors on it."
    text = without_scripts(page.read_text(encoding="utf-8"))
    urls = re.findall(r'\s(?:href|src)="([^"]*)"', text)
    anchors = re.findall(r'\sid="([^"]*)"', text)
    return set(map(html.unescape, urls)), set(map(html.unescape, anchors))


def within(page: Path, url: str) -> tuple[Path, str] | None:
    "File and anchor that a link of a page leads to; `None` for links out of the site."
    path, anchor = urldefrag(urljoin(page.as_uri(), url))
    if not path.startswith("file:"): return None
    return Path(unquote(path.removeprefix("file://").partition("?")[0])), unquote(anchor)


def broken(site: Path) -> list[str]:
    "Links to pages, files or anchors that do not exist, and pages that no links lead to."
    urls, anchors = {}, {}
    for page in pages(site): urls[page], anchors[page] = links(page)
    # icons that the script adds to every page
    script = (site / "_static/site.js").read_text(encoding="utf-8")
    icons = set(re.findall(r'<symbol id=\\"([\w-]+)', script))
    for page in anchors: anchors[page] |= icons

    found, todo, seen = [], [site / "index.html"], set()
    while todo:
        page = todo.pop()
        if page in seen: continue
        seen.add(page)
        for url in urls[page]:
            target, anchor = within(page, url) or (page, "")
            if target in urls: todo.append(target)
            if not target.is_file() or not target.is_relative_to(site):
                found.append(f"{page.name}: {url}")
            elif anchor and target in anchors and anchor not in anchors[target]:
                found.append(f"{page.name}: {url}, no such anchor")
    lonely = [page.name for page in urls if page not in seen]
    return found + [f"{name} is not reachable from index.html" for name in lonely]


def test_every_page_is_reachable_and_no_link_is_broken(site):
    assert not broken(site)
    assert sum(file.stat().st_size for file in site.rglob("*") if file.is_file()) <= 12_000_000


@pytest.mark.parametrize("name, text, complaint", [
    ("index", '<a href="gone.html">', "gone.html"),
    ("index", '<a href="api.html#gone">', "no such anchor"),
    ("lonely", "", "not reachable"),
])
def test_a_broken_link_is_noticed(site, tmp_path, name, text, complaint):
    "The check above can fail: a lost page, a lost anchor, a page nobody links to."
    large = shutil.ignore_patterns("packed_plotly.js")
    copy = shutil.copytree(site, tmp_path / "site", ignore=large)
    (copy / "_static/packed_plotly.js").touch()
    with (copy / f"{name}.html").open("a") as file: file.write(text)
    assert [found for found in broken(copy) if complaint in found]


# What is where

def chapters() -> dict[str, list[str]]:
    "Shelf -> the pages of its chapters, in the order of their numbers."
    found: dict[str, list[str]] = {shelf: [] for shelf in SHELVES}
    for path in sorted(NBS.glob("[0-9]*.ipynb")):
        name = path.stem.split("_", 1)[1]
        package = "run" if name == "main" else name.rpartition(".")[0]
        found[SHELVES[PACKAGES.index(package)]].append(f"{name}.html")
    return {shelf: pages for shelf, pages in found.items() if pages}


def test_the_sidebar_has_each_chapter_on_its_shelf(site, looks):
    "Each package is a part of the sidebar, and its chapters are in the order of their numbers."
    parts = {}
    for caption, urls in looks[site / "index.html"]["sidebar"]:
        parts[caption.capitalize()] = [url.rsplit("/", 1)[1] for url in urls]
    shelves = {name: urls for name, urls in parts.items() if name in SHELVES}
    assert list(shelves.items()) == list(chapters().items())
    assert list(parts)[0] == "Tutorials"
    assert len(parts["Tutorials"]) == len(list((NBS / "tutorials").glob("[0-9]*.ipynb")))


def test_the_api_page_has_every_name_by_shelf(site):
    "All that `import flashmorph` offers, also what it looks up on demand; then every module."
    text = (site / "api.html").read_text(encoding="utf-8")
    for name in flashmorph.__all__:
        full = f"{getattr(flashmorph, name).__module__}.{name}"
        assert re.search(rf'href="?[^" ]*#{re.escape(full)}\b[^>]*><code[^>]*>.*?fm\.{name}<', text)
    headings = [re.sub(r"<[^>]*>", "", found) for found in re.findall(r"<h2>(.*?)<a", text)]
    assert headings == [name for name in SHELVES if name in chapters()]
    modules = re.findall(r"<h3>flashmorph\.([\w.]+)<a", text)
    assert modules == sorted(modules, key=[page[:-5] for pages in chapters().values()
                                           for page in pages].index)


def test_a_parameter_does_not_link_to_a_function_of_its_name(looks):
    "In the entry of `uniform`, `align` is its argument, not the function `fm.align`."
    entries = {entry["name"]: entry for look in looks.values() for entry in look["entries"]}
    for name, entry in entries.items():
        assert not set(entry["signature"]) & set(entry["linked"]), name
    assert "align" in entries["flashmorph.choose.uniform.uniform"]["signature"]
    assert len([name for name, entry in entries.items() if entry["linked"]]) > 20


# Code that can be read whole

def test_a_code_cell_holds_100_columns_at_1300_pixels(looks):
    room = [columns for look in looks.values() for columns in look["room"]]
    assert len(room) > 100
    assert min(room) >= 100


def page_of(site: Path, notebook: str) -> Path:
    "The page of a notebook: without the number."
    name = re.sub(r"\b\d+_", "", notebook.removeprefix("nbs/"))
    return (site / name).with_suffix(".html")


@pytest.mark.parametrize("nb", CHAPTERS, ids=lambda nb: nb.name)
def test_exported_cells_of_up_to_25_lines_are_not_folded(site, nb):
    text = page_of(site, nb.name).read_text(encoding="utf-8")
    cells = [source for source in nb.exported if not is_imports(source)]
    folded = [source for source in cells if len(lines_of(source)) > 25]
    assert text.count('<details class="admonition hide above-input">') == len(folded)


@pytest.mark.parametrize("name", ["930_serve.native", "980_serve.engine", "tutorials/09_serve_it"])
def test_tables_that_code_writes_are_tables(site, name):
    cells = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    written = [output for output in outputs if "text/markdown" in output.get("data", {})]
    page = page_of(site, f"nbs/{name}.ipynb").read_text(encoding="utf-8")
    assert len(written) > 0 and page.count("<table") >= len(written)


def test_no_code_is_cut_at_1300_pixels(site, looks):
    "On pages of notebooks that are set; see `NOT_YET`."
    set_pages = looks.keys() - {page_of(site, name) for name in NOT_YET}
    assert not {page.name: looks[page]["cut"] for page in set_pages if looks[page]["cut"]}


def test_no_page_is_wider_than_its_window(looks):
    "Neither at 1,300 pixels nor on a phone, where wide code and tables scroll within the page."
    assert not [page.name for page, look in looks.items() if any(look["overflows"])]


# What pages do

def test_every_page_shows_without_trouble_and_draws_its_figures(site, tab, address):
    drawn = 0
    for path in pages(site):
        figures = path.read_text(encoding="utf-8").count('<div class="figure"')
        tab.goto(address + path.relative_to(site).as_posix())
        tab.wait_for_function(DRAWN, arg=figures)
        assert not tab.problems, path.name
        drawn += figures
    assert drawn > 0


def test_search_finds_a_symbol_and_its_description(tab, address):
    name = "flashmorph.choose.gates.train_gates"
    tab.goto(address + "search.html?q=train_gates")
    tab.wait_for_selector("#search-results li a")
    tab.locator(f"#search-results li a[href*='{name}']").first.click()
    tab.wait_for_selector(f"dt[id='{name}']:visible")
    tab.goto(address + "index.html")
    tab.fill("input.sidebar-search", "morphable")
    tab.press("input.sidebar-search", "Enter")
    tab.wait_for_selector("#search-results li a")


def test_the_explorer_on_the_site_moves_its_selection(tab, address):
    "The static twin: no kernel, and still a slider that chooses layers and counts what they cost."
    def costs(): return tab.locator(".fm-explorer .fm-value").all_inner_texts()
    bars = """count => count === document.querySelectorAll(
        '.fm-explorer g[data-layer] rect.full[data-row="0"]').length"""
    tab.goto(address + "tutorials/budget.html")
    tab.locator(".fm-explorer .fm-slider").first.focus()
    tab.keyboard.press("Home")
    tab.wait_for_function(bars, arg=0)
    cheapest = costs()
    for _ in range(4): tab.keyboard.press("ArrowRight")
    tab.wait_for_function(bars, arg=4)
    assert cheapest and costs() != cheapest


def test_both_themes_change_the_page(tab, address):
    "The letters are dark on light, and the other way round."
    red = "+getComputedStyle(document.body).color.match(/\\d+/)[0]"
    tab.goto(address)
    for scheme, dark in (("light", 0), ("dark", 1)):
        tab.emulate_media(color_scheme=scheme)
        tab.wait_for_function(f"dark => ({red} > 127) == dark", arg=dark)
