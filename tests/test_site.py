"The built site in a real browser, over http and from files: all of it reachable, nothing broken, nothing asked of anyone else."
import functools
import html
import http.server
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

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / "docs/_build/html"
DRAWN = """n => n === [...document.querySelectorAll('div.figure')].filter(d =>
    d.querySelector('.trace, .hm') && d.querySelector('.cartesianlayer').getBoundingClientRect().width > 99).length"""
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Path:
    "The site as it is built from what stands here now."
    done = subprocess.run([sys.executable, ROOT / "docs/build.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


@pytest.fixture(scope="module")
def browser():
    with chromium() as b: yield b


@pytest.fixture(params=["http", "file"])
def address(request, site) -> Iterator[str]:
    "Where the site is, with a slash at the end."
    if request.param == "file": yield site.as_uri() + "/"; return
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()


@pytest.fixture
def tab(browser, address):
    "A page on which nothing may go wrong, and that may ask nothing of other machines."
    page = open_page(browser, width=1440)
    page.on("response", lambda r: page.problems.append(f"{r.status} for {r.url}") if r.status >= 400 else None)
    yield page
    page.context.close()
    assert not page.problems


def links(page: Path) -> tuple[set[str], set[str]]:
    "Addresses that a page links to or loads, and the anchors on it."
    text = re.sub(r"<script\b[^>]*>.*?</script>", lambda m: m[0][:m[0].index(">")], page.read_text(encoding="utf-8"), flags=re.S)
    return {html.unescape(u) for u in re.findall(r'\s(?:href|src)="([^"]*)"', text)}, {html.unescape(i) for i in re.findall(r'\sid="([^"]*)"', text)}


def broken(site: Path) -> list[str]:
    "Links within the site to pages, files or anchors that do not exist; pages that no links from the index lead to."
    found, anchors, todo, seen = [], {}, [site / "index.html"], set()
    while todo:
        page = todo.pop()
        if page in seen: continue
        seen.add(page)
        urls, anchors[page] = links(page)
        for url in urls:
            path, anchor = urldefrag(urljoin(page.as_uri(), url))
            if not path.startswith("file:"): continue
            target = Path(unquote(path.removeprefix("file://").partition("?")[0]))
            if not target.is_file() or not target.is_relative_to(site): found.append(f"{page.name}: {url}"); continue
            if target.suffix != ".html": continue
            todo.append(target)
            if target not in anchors: anchors[target] = links(target)[1]
            if anchor and unquote(anchor) not in anchors[target]: found.append(f"{page.name}: {url}, no such anchor")
    return found + [f"{page.name} is not reachable from index.html" for page in site.rglob("*.html") if page not in seen and "_static" not in page.parts]


def test_every_page_is_reachable_and_no_link_is_broken(site):
    assert not broken(site)
    assert sum(f.stat().st_size for f in site.rglob("*") if f.is_file()) <= 12_000_000


def test_a_broken_link_is_noticed(site, tmp_path):
    "The check above can fail: a lost page, a lost anchor, a page nobody links to."
    for name, text, complaint in (("index", '<a href="gone.html">', "gone.html"), ("index", '<a href="api.html#gone">', "no such anchor"),
                                  ("lonely", "", "not reachable")):
        copy = shutil.copytree(site, tmp_path / complaint.replace(" ", "_"), ignore=shutil.ignore_patterns("plotly.min.js"))
        (copy / "_static/plotly.min.js").touch()
        with (copy / f"{name}.html").open("a") as f: f.write(text)
        assert [found for found in broken(copy) if complaint in found]


def test_every_page_shows_without_trouble_and_draws_its_figures(site, tab, address):
    drawn = 0
    for path in sorted(site.rglob("*.html")):
        if "_static" in path.parts: continue
        figures = path.read_text(encoding="utf-8").count('<div class="figure"')
        tab.goto(address + path.relative_to(site).as_posix())
        tab.wait_for_function(DRAWN, arg=figures)
        assert not tab.problems, path.name
        drawn += figures
    assert drawn > 0


def test_search_finds_a_symbol_and_its_description(tab, address):
    tab.goto(address + "search.html?q=train_gates")
    tab.wait_for_selector("#search-results li a")
    found = tab.locator("#search-results li a[href*='flashmorph.choose.gates.train_gates']")
    found.first.click()
    tab.wait_for_selector("dt[id='flashmorph.choose.gates.train_gates']:visible")
    tab.goto(address + "index.html")
    tab.fill("input.sidebar-search", "morphable")
    tab.press("input.sidebar-search", "Enter")
    tab.wait_for_selector("#search-results li a")


def test_the_explorer_on_the_site_moves_its_selection(tab, address):
    "The static twin: no kernel, and still a slider that chooses layers and counts what they cost."
    def costs(): return tab.locator(".fm-explorer .fm-value").all_inner_texts()
    bars = "n => document.querySelectorAll('.fm-explorer g[data-layer] rect.full[data-row=\"0\"]').length === n"
    tab.goto(address + "tutorials/budget.html")
    tab.locator(".fm-explorer .fm-slider").first.focus()
    tab.keyboard.press("Home")
    tab.wait_for_function(bars, arg=0)
    cheapest = costs()
    for _ in range(4): tab.keyboard.press("ArrowRight")
    tab.wait_for_function(bars, arg=4)
    assert cheapest and costs() != cheapest


def test_both_themes_change_the_page(tab, address):
    tab.goto(address)
    for scheme, dark in (("light", 0), ("dark", 1)):
        tab.emulate_media(color_scheme=scheme)      # the letters are dark on light, and the other way round
        tab.wait_for_function("dark => (+getComputedStyle(document.body).color.match(/\\d+/)[0] > 127) == dark", arg=dark)
