"""Turn the notebooks into the site: `make docs` writes docs/_build/html.

The notebooks are shown with the outputs they carry; nothing is run. nbdev's filter reads the
directives and drops what is hidden, `api.py` describes what is exported, and Sphinx with MyST-NB
and Furo does the rest (`conf.py`)."""
import base64
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import plotly
from api import Index
from execnb.nbio import mk_cell, read_nb, write_nb
from execute import is_bar
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
NBS = ROOT / "nbs"
WORK = DOCS / "_work"                                  # what Sphinx reads
SITE = DOCS / "_build/html"
API = Index(ROOT / "flashmorph")

# The package of a chapter's module is its shelf.
SHELVES = {"": "Store and nouns", "ops": "Ops", "data": "Data", "model": "Model",
           "train": "Training", "measure": "Measuring", "choose": "Choosing", "show": "Showing",
           "run": "Running", "serve": "Serving"}
UNFOLDED = 25                                          # lines; longer exported cells are folded

PLOTLY = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
TAGS = {("echo:", "false"): "remove-input", ("output:", "false"): "remove-output",
        ("include:", "false"): "remove-cell", ("code-fold:", "true"): "hide-input"}
NOT_NBDEVS = {"FrontmatterProc", "insert_warning", "add_show_docs", "clean_show_doc",
              "exec_show_docs", "rm_export", "mv_exports", "add_fold", "add_links"}
ICONS = re.compile(r"<svg[^>]*display: none[^>]*>.*</symbol>\s*</svg>", re.S)      # of the theme
COLOURS = re.compile(r"<style>(\s*body \{.*?)</style>", re.S)      # of the theme, too
SHORTER = [
    (re.compile(r'(<\w+ class)="([\w-]+)">'), r"\1=\2>"),
    (re.compile(r'(href="[^"]*#([^"]+)") title="\2"'), r"\1"),      # what the address says already
    (re.compile(r'title="Link to this \w+"'), "title=Link"),
    (re.compile(r"</a></li>"), "</a>"),
    (re.compile(r"<span class=(\w\w?)>([^<]*)</span>"), r"<i class=\1>\2</i>"),     # coloured code
]
ANCHOR = re.compile(r"<a [^<>]*>")
QUOTED = re.compile(r' ([\w-]+)="([\w./#:-]*\w)"(?=[ >])')
TREE = re.compile(r'<div class="(?:sidebar|toc)-tree">.*?</div>', re.S)
TREE_RULE = re.compile(r"\.(?:sidebar|toc)-tree[^{},]*")
CLASSES = re.compile(r' class="([^"]*)"')
NAMED = re.compile(r"""[."' ]([A-Za-z_][\w-]*)""")        # a class in a style sheet or a script
SCRIPTS = re.compile(r"<(?:script|style)\b.*?</(?:script|style)>", re.S)
VERBATIM = re.compile(r"(<(?:pre|script|textarea)\b.*?</(?:pre|script|textarea)>)", re.S)
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")        # a Markdown link to a file


@dataclass(frozen=True)
class Notebook:
    "What the site needs to know of a notebook before it is converted."
    path: Path

    @cached_property
    def cells(self) -> list: return read_nb(self.path).cells

    @property
    def title(self) -> str: return re.search(r"^# (.*)", self.cells[0].source)[1]

    @property
    def short_title(self) -> str:
        "The title before its colon, for the sidebar."
        return self.title.partition(": ")[0]

    @property
    def description(self) -> str: return re.search(r"^> (.*)", self.cells[0].source, re.M)[1]

    @property
    def module(self) -> str:
        "The module that it writes, with the package in front; empty for a page that writes none."
        code = "\n".join(cell.source for cell in self.cells if cell.cell_type == "code")
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", code, re.M)
        return f"flashmorph.{found[1]}" if found else ""

    @property
    def part(self) -> str:
        "The part of the site that it belongs to: a shelf of the book, or `Tutorials`, ..."
        if self.path.parent != NBS: return self.path.parent.name.capitalize()
        package = ".".join(self.module.split(".")[1:-1])
        if self.module.endswith("__main__"): package = "run"
        if re.match(r"\d+", self.path.name): return SHELVES[package]
        return "" if self.path.stem == "index" else "Benchmarks"

    @property
    def page(self) -> Path:
        "The file that Sphinx reads: without the number, as nbdev has it."
        name = re.sub(r"^\d+[a-zA-Z]*_", "", self.path.name)
        return WORK / self.path.relative_to(NBS).with_name(name)

    @property
    def address(self) -> str: return self.page.relative_to(WORK).as_posix()


def notebooks() -> list[Notebook]:
    "Every notebook, in the order of its number."
    names = [path.relative_to(NBS) for path in sorted(NBS.rglob("*.ipynb"))]
    shown = [name for name in names if not any(part[0] in "._" for part in name.parts)]
    return [Notebook(NBS / name) for name in shown]


def copied(file: Path) -> Path:
    "Where the site has a file that is no notebook; it is copied there."
    place = WORK / file.relative_to(NBS if file.is_relative_to(NBS) else ROOT)
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, place)
    return place


def linked(text: str, notebook: Notebook) -> str:
    "Markdown with the links of the site: to its pages and files, and from code to its symbol."
    def link(found: re.Match) -> str:
        file, mark, anchor = found[1].partition("#")
        target = Path(os.path.normpath(notebook.path.parent / file))
        if not target.is_file():
            raise SystemExit(f"{notebook.path.name}: link to {found[1]}, which does not exist")
        place = Notebook(target).page if target.suffix == ".ipynb" else copied(target)
        return f"]({os.path.relpath(place, notebook.page.parent)}{mark}{anchor})"
    return API.linked(LINK.sub(link, text), notebook.module)


def drawn(figure: dict) -> str:
    "HTML from which site.js draws a plotly figure."
    height = figure.get("layout", {}).get("height", 450)
    data = json.dumps(figure, separators=(",", ":")).replace("</", "<\\/")
    script = f'<script type="application/json">{data}</script>'
    return f'<div class="figure" style="min-height:{height}px">{script}</div>'


def shown(output: dict, notebook: Notebook) -> dict:
    "An output as the site shows it: a widget as its static twin, a figure drawn by site.js."
    data = output.get("data", {})
    if data.pop(WIDGET, None):
        if not {PLOTLY, "text/html"} & data.keys():
            raise SystemExit(f"{notebook.path.name}: a widget without a static twin")
        if "text/html" in data: data.pop(PLOTLY, None)  # the page does more than the figure
    if PLOTLY in data: output["data"] = {"text/html": drawn(data[PLOTLY])}
    return output


def folded(source: str) -> bool:
    "Whether an exported cell is too long to be read in passing."
    return sum(bool(line.strip()) for line in source.splitlines()) > UNFOLDED


def exported(cell, module: str) -> list:
    """In place of an exported cell: what it defines, and its code, folded if that is long. Nothing
    for a cell of imports."""
    names = [getattr(node, "name", "") for node in cell.parsed_() or []]
    if not names or re.match(r"(from|import)\s", cell.source.strip()): return []
    found = [API.symbols.get(f"{module}.{name}") for name in names]
    entries = [API.entry(symbol) for symbol in found if symbol]
    if folded(cell.source):
        labels = {"code_prompt_show": "Source", "code_prompt_hide": "Source"}
        cell.metadata = {"tags": ["hide-input"], "mystnb": labels}
    described = [mk_cell("\n\n".join(entries), "markdown")] if entries else []
    return [*described, cell]


def code(cell, notebook: Notebook) -> list:
    "The cells in place of one code cell."
    directives = {name: " ".join(args).lower() for name, args in cell.directives_.items()}
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    cell.metadata = {"tags": [tag for key, tag in TAGS.items() if key in directives.items()]}
    cell.outputs = [shown(output, notebook) for output in cell.outputs if not is_bar(output)]
    if {"export", "exports", "exporti"} & directives.keys(): return exported(cell, notebook.module)
    return [cell] if cell.source and "default_exp" not in directives else []


def convert(notebook: Notebook) -> None:
    "One notebook into a page for MyST-NB."
    nb = read_nb(notebook.path)
    procs = [proc for proc in FilterDefaults().base_procs() if proc.__name__ not in NOT_NBDEVS]
    NBProcessor(nb=nb, procs=procs).process()
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "code":
            cells += code(cell, notebook)
        else:
            cell.source = linked(cell.source, notebook)
            cells.append(cell)
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nb.cells = cells
    nb.metadata = {"kernelspec": kernel}
    notebook.page.parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, notebook.page)


def parts(book: list[Notebook]) -> dict[str, list[Notebook]]:
    "The notebooks of each part of the site, in the order of the sidebar."
    names = ["Tutorials", *SHELVES.values(), "Benchmarks"]
    found = {name: [notebook for notebook in book if notebook.part == name] for name in names}
    return {name: inside for name, inside in found.items() if inside}


def contents(book: list[Notebook]) -> str:
    "The contents of the site, for the end of the landing page, and the sidebar."
    described, files = ["## Contents"], {}
    for name, inside in parts(book).items():
        described.append(f"### {name}")
        described.append("\n".join(f"- [](<{n.address}>): {n.description}" for n in inside))
        files[name] = [f"{n.short_title} <{n.address}>" for n in inside]
    files |= {"Reference": ["api.md"], "Project": ["CONTRIBUTING.md", "CHANGELOG.md"]}
    sidebar = ["\n".join(["```{toctree}", ":hidden:", f":caption: {name}", "", *inside, "```"])
               for name, inside in files.items()]
    return "\n\n".join([*described, *sidebar])


def api_page(book: list[Notebook]) -> str:
    "The page of all symbols, by shelf."
    shelves = {name: inside for name, inside in parts(book).items() if name in SHELVES.values()}
    return API.page({name: {notebook.module: notebook.address for notebook in inside}
                     for name, inside in shelves.items()})


SIGNATURE = re.compile(r'<dt class="sig.*?</dt>', re.DOTALL)
UNCOLOURED = re.compile(r'<span class="(?:pre|p|w)">([^<]*)</span>')
INLINE = re.compile(r'<span class="pre">([^<]*)</span>')       # a word of code in prose


def bare(signature: str) -> str:
    "A signature without the spans that have no colour of their own, from the innermost outwards."
    inside = ""
    while inside != signature:
        inside = signature
        signature = UNCOLOURED.sub(r"\1", signature)
    return signature


def dressed(page: str, known: set[str]) -> str:
    "The page without the classes that no style sheet and no script knows."
    own = {name for script in SCRIPTS.findall(page) for name in NAMED.findall(script)}

    def kept(found: re.Match) -> str:
        names = [name for name in found[1].split() if name in known or name in own]
        return f' class="{" ".join(names)}"' if names else ""
    return CLASSES.sub(kept, page)


def light(page: str, known: set[str]) -> str:
    """The page without what nobody sees: unused classes, spans without a colour, quotes,
    indentation. Icons and colours are in site.js and site.css, once for all pages."""
    page = dressed(COLOURS.sub("", ICONS.sub("", page)), known)
    page = TREE.sub(lambda tree: tree[0].replace(' class="reference"', ""), page)
    page = SIGNATURE.sub(lambda found: bare(found[0]), page)
    pieces = VERBATIM.split(page)
    pieces[::2] = [re.sub(r"\s*\n\s*", "\n", INLINE.sub(r"\1", piece)) for piece in pieces[::2]]
    return "".join(map(short, pieces))


def short(piece: str) -> str:
    "A piece of a page without quotes and end tags that HTML can do without, and titles of links."
    if piece.startswith(("<script", "<textarea")): return piece
    for what, less in SHORTER: piece = what.sub(less, piece)
    return ANCHOR.sub(lambda tag: QUOTED.sub(r" \1=\2", tag[0]), piece)


def lighten() -> None:
    "Make the pages light, and drop what only helps to debug the theme."
    for file in SITE.rglob("*.map"): file.unlink()
    shorten_trees(SITE / "_static/styles/furo.css")
    rules = [file for kind in ("css", "js") for file in SITE.rglob(f"*.{kind}")]
    known = {name for file in rules for name in NAMED.findall(file.read_text(encoding="utf-8"))}
    add_to_all((SITE / "index.html").read_text(encoding="utf-8"))
    for file in SITE.rglob("*.html"):
        file.write_text(light(file.read_text(encoding="utf-8"), known), encoding="utf-8")


def shorten_trees(sheet: Path) -> None:
    "Let the theme find the links of sidebar and contents without a class on each of them."
    def shorter(rule: re.Match) -> str:
        return rule[0].replace(".reference", ":any-link").replace(".toctree-l1", "li")
    sheet.write_text(TREE_RULE.sub(shorter, sheet.read_text(encoding="utf-8")), encoding="utf-8")


def add_to_all(page: str) -> None:
    "Let site.css have the colours, and site.js add the icons, that every page begins with."
    with (SITE / "_static/site.css").open("a", encoding="utf-8") as sheet:
        sheet.write(COLOURS.search(page)[1])
    icons = re.sub(r"\s*\n\s*", " ", ICONS.search(page)[0])
    with (SITE / "_static/site.js").open("a", encoding="utf-8") as script:
        script.write(f'document.body.insertAdjacentHTML("beforeend", {json.dumps(icons)});\n')


def packed(script: Path) -> str:
    "A script that holds the text of another as base64 of gzip's bytes; site.js unpacks it."
    small = gzip.compress(script.read_bytes(), mtime=0)
    return f'const packedPlotly = "{base64.b64encode(small).decode()}";\n'


def main() -> int:
    for folder in (WORK, SITE): shutil.rmtree(folder, ignore_errors=True)
    WORK.mkdir(parents=True)
    book = notebooks()
    for notebook in book: convert(notebook)
    (WORK / "api.md").write_text(api_page(book), encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"): shutil.copy(ROOT / name, WORK)
    index = read_nb(WORK / "index.ipynb")
    index.cells.append(mk_cell(contents(book), "markdown"))
    write_nb(index, WORK / "index.ipynb")
    sphinx = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    failed = subprocess.call([*sphinx, "-c", DOCS, "-d", WORK / ".doctrees", WORK, SITE])
    if failed: return failed
    lighten()
    script = Path(plotly.__file__).parent / "package_data/plotly.min.js"
    (SITE / "_static/packed_plotly.js").write_text(packed(script), encoding="utf-8")
    return 0


if __name__ == "__main__": sys.exit(main())
