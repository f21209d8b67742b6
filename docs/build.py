"""Turn the notebooks into the site: `make docs` writes docs/_build/html.

The notebooks are shown with the outputs they carry; nothing is run. nbdev's filter reads the directives and drops what is hidden,
`api.py` describes what is exported, and Sphinx with MyST-NB and Furo does the rest (`conf.py`)."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from api import Index
from execnb.nbio import mk_cell, read_nb, write_nb
from execute import is_bar
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

DOCS = Path(__file__).resolve().parent
ROOT, NBS, WORK, SITE = DOCS.parent, DOCS.parent / "nbs", DOCS / "_work", DOCS / "_build/html"
PLOTLY, WIDGET = "application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json"
TAGS = {("echo:", "false"): "remove-input", ("output:", "false"): "remove-output", ("include:", "false"): "remove-cell",
        ("code-fold:", "true"): "hide-input"}
API = Index(ROOT / "flashmorph")


def page_of(path: Path) -> Path:
    "Where a notebook goes, as nbdev has it: without the number."
    return WORK / path.relative_to(NBS).with_name(re.sub(r"^\d+[a-zA-Z]*_", "", path.name))


def linked(text: str, path: Path, module: str) -> str:
    "Markdown with links for the site: to other pages, to files (copied along), and from code to the symbol it names."
    def link(m: re.Match) -> str:
        file, hash, anchor = m[1].partition("#")
        target = Path(os.path.normpath(path.parent / file))
        if not target.is_file(): raise SystemExit(f"{path.name}: link to {m[1]}, which does not exist")
        place = page_of(target) if target.suffix == ".ipynb" else WORK / target.relative_to(NBS if target.is_relative_to(NBS) else ROOT)
        if target.suffix != ".ipynb":
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(target, place)
        return f"]({os.path.relpath(place, page_of(path).parent)}{hash}{anchor})"
    return API.linked(re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", link, text), module)


def shown(output: dict, path: Path) -> dict:
    "An output as the site shows it: a widget as its static twin, a figure drawn by site.js."
    data = output.get("data", {})
    if data.pop(WIDGET, None):
        if not {PLOTLY, "text/html"} & data.keys(): raise SystemExit(f"{path.name}: a widget without a static twin")
        if "text/html" in data: data.pop(PLOTLY, None)                  # the page of the widget does more than the figure of it
    if PLOTLY in data:
        figure = json.dumps(data[PLOTLY], separators=(",", ":")).replace("</", "<\\/")
        height = data[PLOTLY].get("layout", {}).get("height", 450)
        output["data"] = {"text/html": f'<div class="figure" style="min-height:{height}px"><script type="application/json">{figure}</script></div>'}
    return output


def exported(cell, module: str) -> list:
    "In place of an exported cell: what it defines, and its code folded. Nothing for a cell of imports."
    names = [getattr(node, "name", "") for node in cell.parsed_() or []]
    entries = [API.linked(API.symbols[full].entry(), module) for name in names if (full := f"{module}.{name}") in API.symbols]
    if not names or re.match(r"(from|import)\s", cell.source.strip()): return []
    cell.metadata = {"tags": ["hide-input"], "mystnb": {"code_prompt_show": "Source", "code_prompt_hide": "Source"}}
    return [mk_cell("\n\n".join(entries), "markdown"), cell] if entries else [cell]


def convert(path: Path) -> None:
    "One notebook into a page for MyST-NB."
    nb = read_nb(path)
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(c.source for c in nb.cells if c.cell_type == "code"), re.M)
    module = f"flashmorph.{found[1]}" if found else ""
    ours = ("FrontmatterProc", "insert_warning", "add_show_docs", "clean_show_doc", "exec_show_docs", "rm_export", "mv_exports", "add_fold", "add_links")
    processor = NBProcessor(nb=nb, procs=[p for p in FilterDefaults().base_procs() if p.__name__ not in ours])
    processor.process()
    cells = []
    for cell in nb.cells:
        if cell.cell_type == "markdown": cell.source = linked(cell.source, path, module); cells.append(cell); continue
        directives = {name: " ".join(args).lower() for name, args in cell.directives_.items()}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        cell.metadata = {"tags": [tag for key, tag in TAGS.items() if key in directives.items()]}
        cell.outputs = [shown(o, path) for o in cell.outputs if not is_bar(o)]
        if {"export", "exports", "exporti"} & directives.keys(): cells += exported(cell, module)
        elif cell.source and "default_exp" not in directives: cells.append(cell)
    nb.cells, nb.metadata = cells, {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    page_of(path).parent.mkdir(parents=True, exist_ok=True)
    write_nb(nb, page_of(path))
    if module: CHAPTERS[module] = page_of(path).name


def contents(notebooks: list[Path]) -> str:
    "The contents of the site, for the end of the landing page and for the sidebar."
    sections = {"Tutorials": [p for p in notebooks if p.parent.name == "tutorials"],
                "The book": [p for p in notebooks if p.parent == NBS and "bench" not in p.name and p.stem != "index"],
                "Benchmarks": [p for p in notebooks if p.parent == NBS and "bench" in p.name]}
    pages = {name: [page_of(p).relative_to(WORK).as_posix() for p in paths] for name, paths in sections.items()}
    pages = {"Tutorials": pages["Tutorials"], "The book": pages["The book"], "API": ["api.md"], "Benchmarks": pages["Benchmarks"],
             "Project": ["CONTRIBUTING.md", "CHANGELOG.md"]}
    trees = ["\n".join(["```{toctree}", ":hidden:", f":caption: {name}", "", *files, "```"]) for name, files in pages.items() if files]
    described = [f"### {name}\n\n" + "\n".join(f"- [](<{page_of(p).relative_to(WORK).as_posix()}>): {description(p)}" for p in paths)
                 for name, paths in sections.items() if paths]
    return "\n\n".join(["## Contents", *described, *trees])


def description(path: Path) -> str:
    "The sentence under the title."
    return re.search(r"^> (.*)", read_nb(path).cells[0].source, re.M)[1]


CHAPTERS: dict[str, str] = {}


def main() -> int:
    for folder in (WORK, SITE): shutil.rmtree(folder, ignore_errors=True)
    notebooks = [p for p in sorted(NBS.rglob("*.ipynb")) if not any(part[0] in "._" for part in p.relative_to(NBS).parts)]
    WORK.mkdir(parents=True)
    for path in notebooks: convert(path)
    (WORK / "api.md").write_text(API.page(CHAPTERS), encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"): shutil.copy(ROOT / name, WORK)
    index = read_nb(WORK / "index.ipynb")
    index.cells.append(mk_cell(contents(notebooks), "markdown"))
    write_nb(index, WORK / "index.ipynb")
    return subprocess.call([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", DOCS, "-d", WORK / ".doctrees", WORK, SITE])


if __name__ == "__main__": sys.exit(main())
