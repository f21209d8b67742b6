"The project rules (CONTRIBUTING.md), checked on what is in git and on what is about to be."
import ast
import fnmatch
import io
import json
import re
import statistics
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import distributions

import pytest
from notebooks import (
    BOOK,
    CHAPTERS,
    NOT_YET,
    ROOT,
    Notebook,
    is_exported,
    is_imports,
    lines_of,
    read,
)
from packaging.specifiers import SpecifierSet

# Notebooks that export nothing: pages to read.
PAGES = {"nbs/index.ipynb", "nbs/benchmarks.ipynb", "nbs/bench_selectors.ipynb"}
FRAME = {"settings.ini", "setup.py", "nbs", "flashmorph", "tests", "docs", "README.md", "LICENSE",
         "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "MANIFEST.in", "constraints.txt",
         "pyproject.toml"}
# What `import flashmorph` must not bring in.
LIGHT = {"plotly", "fla", "triton", "datasets", "ipywidgets", "anywidget", "nbdev"}

MACHINE_PATH = r"(?<![\w.:/-])/(?:home|root|tmp|work|Users|opt|mnt)/\w"
REGISTRY = r"\bpypi\.(?:org)|files\.python(?:hosted)|registry\.(?:npmjs)|deb\.(?:debian)"
ADDRESS = r"\b0x[0-9a-fA-F]{6,}\b"

every = pytest.mark.parametrize("nb", BOOK, ids=lambda nb: nb.name)
every_chapter = pytest.mark.parametrize("nb", CHAPTERS, ids=lambda nb: nb.name)


# The order of the chapters

NUMBER = {nb.module: nb.number for nb in CHAPTERS}


def modules_imported(node: ast.AST) -> list[str]:
    """Modules of ours that an import statement names.

    `from flashmorph.ops.chunked import lightning` -> `ops.chunked`."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        source = "flashmorph." * (node.level > 0) + "." * node.level + (node.module or "")
        # `from flashmorph.ops import chunked` names a module behind the word import
        package = source.startswith("flashmorph.") and source[11:] not in NUMBER
        names = [f"{source}.{alias.name}" if package else source for alias in node.names]
    else:
        return []
    ours = [name for name in names if f"{name}.".startswith("flashmorph.")]
    return [name.removeprefix("flashmorph").removeprefix(".") for name in ours]


@every
def test_opens_with_title_and_description(nb):
    kind, source = nb.cells[0]
    assert kind == "markdown"
    assert re.match(r"# \S.*\n\n> \S", source), "begin with `# title`, a line, `> one sentence`"
    reading = nb.name in PAGES or nb.name.startswith("nbs/tutorials/")
    assert nb.module or reading, "no default_exp, and not in PAGES"
    assert nb.module or not nb.exported, "exported cells but no default_exp"


@every_chapter
def test_imports_only_smaller_numbers(nb):
    assert nb.number is not None, "a chapter's file name begins with its number"
    for node in nb.nodes:
        for module in modules_imported(node):
            told = ast.unparse(node)
            assert module in NUMBER, f"write `from flashmorph.module import name`: {told}"
            assert NUMBER[module] < nb.number, f"{nb.number} imports {NUMBER[module]}: {told}"


def test_chapters_have_their_own_numbers_and_modules():
    for what in ("number", "module"):
        values = [getattr(nb, what) for nb in CHAPTERS]
        assert len(set(values)) == len(values), sorted(values)


LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")            # a Markdown link to a file


@every
def test_links_lead_to_files(nb):
    folder = (ROOT / nb.name).parent
    prose = "\n".join(source for kind, source in nb.cells if kind == "markdown")
    assert not [link for link in LINK.findall(prose) if not (folder / link).is_file()]


# Typesetting: each rule yields what breaks it in one notebook

def columns(nb: Notebook) -> Iterator[str]:
    "100 columns at most, in code and prose; a row of a table may be longer."
    for kind, source in nb.cells:
        for line in source.splitlines():
            table = kind == "markdown" and line.startswith("|")
            if len(line) > 100 and not table: yield f"{len(line)} columns: {line}"


def semicolons(nb: Notebook) -> Iterator[str]:
    "One statement a line."
    for source in nb.exported:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.OP and token.string == ";":
                yield f"a semicolon: {token.line.strip()}"


def is_parallel(node: ast.AST) -> bool:
    "Whether a statement is a parallel assignment, `a, b = 1, 2`."
    if not isinstance(node, ast.Assign): return False
    return isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


def parallel(nb: Notebook) -> Iterator[str]:
    "At most two names in a parallel assignment."
    for node in filter(is_parallel, nb.nodes):
        names = len(node.targets[0].elts)
        if names > 2: yield f"{names} names in one assignment: {ast.unparse(node)}"


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nested(nb: Notebook) -> Iterator[str]:
    "No comprehension in a comprehension."
    for node in nb.nodes:
        if isinstance(node, COMPREHENSIONS):
            inside = [inner for inner in ast.walk(node) if isinstance(inner, COMPREHENSIONS)]
            if len(inside) > 1: yield f"a comprehension in a comprehension: {ast.unparse(node)}"


def screens(nb: Notebook) -> Iterator[str]:
    "An exported cell fits a screen: 45 lines, a Triton kernel 90."
    for source in nb.exported:
        lines = lines_of(source)
        if len(lines) > (90 if "@triton.jit" in source else 45):
            yield f"a cell of {len(lines)} lines: {lines[0]}"


def module_length(nb: Notebook) -> Iterator[str]:
    "A module has 300 lines at most."
    if nb.module is None: return
    path = ROOT / "flashmorph" / f"{nb.module.replace('.', '/')}.py"
    length = len(path.read_text(encoding="utf-8").splitlines())
    if length > 300: yield f"a module of {length} lines"


def code_cells(nb: Notebook) -> list[str]:
    "The code cells that say something: neither empty nor exported imports."
    said = [source for source in nb.code if lines_of(source)]
    return [source for source in said if not (is_exported(source) and is_imports(source))]


def far_from_examples(nb: Notebook) -> Iterator[str]:
    "At most 40 exported lines between two examples."
    length = 0
    for source in code_cells(nb):
        length = length + len(lines_of(source)) if is_exported(source) else 0
        if length > 40 and len(lines_of(source)) != length:
            yield f"{length} exported lines without an example, up to {lines_of(source)[0]}"


RULES = [columns, semicolons, parallel, nested, screens, module_length, far_from_examples]


@cache
def faults(nb: Notebook) -> list[str]:
    "Every fault in the typesetting of a notebook."
    return [fault for rule in RULES for fault in rule(nb)]


@every
def test_is_typeset(nb):
    if nb.name in NOT_YET:
        assert faults(nb), f"keeps the rules now: take {nb.name} off NOT_YET"
    else:
        assert not faults(nb)


WAITING = {nb.name for nb in BOOK} & NOT_YET
of_the_whole_book = pytest.mark.xfail(bool(WAITING), reason=f"{len(WAITING)} not set yet")


def exported_cells(book: list[Notebook]) -> list[str]:
    "The exported cells of a book, without those that only import."
    return [source for nb in book for source in code_cells(nb) if is_exported(source)]


def example_share(book: list[Notebook]) -> float:
    "How many of the exported cells are followed at once by an example or a check."
    followed = []
    for nb in book:
        exports = [*map(is_exported, code_cells(nb)), True]
        followed += [not after for now, after in zip(exports, exports[1:]) if now]
    return sum(followed) / len(followed)


@of_the_whole_book
def test_half_of_the_exported_cells_are_short():
    assert statistics.median(len(lines_of(source)) for source in exported_cells(BOOK)) <= 15


@of_the_whole_book
def test_examples_follow_exported_cells():
    assert example_share(BOOK) >= 0.65


def made_up(*cells: str) -> Notebook:
    "A chapter of code cells; those that begin with `def`, `class` or `x` are exported."
    def cell(source: str) -> dict:
        exported = re.match(r"(def|class|x)\b", source)
        text = f"#| export\n{source}" if exported else source
        return {"cell_type": "code", "source": text.splitlines(keepends=True)}
    return Notebook("made_up", json.dumps({"cells": list(map(cell, cells))}))


LONG = "def f():\n" + "    g()\n" * 29                     # an exported cell of 30 lines


@pytest.mark.parametrize("rule, good, bad", [
    (columns, ["x" + "=" * 99], ["x" + "=" * 100]),
    (semicolons, ["x = ';'", "a = 1; b = 2"], ["x = 1; y = 2"]),
    (parallel, ["x, y = 1, 2"], ["x, y, z = 1, 2, 3"]),
    (nested, ["x = [i for i in y]"], ["x = [[i for i in j] for j in y]"]),
    (screens, [LONG + "    g()\n" * 15], [LONG + "    g()\n" * 16]),
    (far_from_examples, [LONG, "f()", LONG], [LONG, LONG, "f()"]),
])
def test_each_rule_can_be_broken(rule, good, bad):
    assert not list(rule(made_up(*good)))
    assert len(list(rule(made_up(*bad)))) == 1


def test_the_share_of_examples_is_counted():
    assert example_share([made_up(LONG, "f()", LONG, LONG, "f()")]) == 2 / 3
    assert example_share([made_up("import a", "x = 1"), made_up("f()")]) == 0


def test_the_list_of_files_not_set_yet_names_files():
    assert not [name for name in NOT_YET if not (ROOT / name).is_file()]


def wide_files() -> set[str]:
    "Scripts and styles beside the notebooks and the Python code that are wider than 100 columns."
    wide = set()
    for name in files():
        if name.endswith((".js", ".css", ".sh", ".toml", "Makefile", "CONTRIBUTING.md")):
            text = (ROOT / name).read_text(encoding="utf-8")
            lines = [line for line in text.splitlines() if not line.startswith("|")]
            if max(map(len, lines)) > 100: wide.add(name)
    return wide


def test_other_files_are_typeset():
    assert wide_files() == {name for name in NOT_YET if not name.endswith(".ipynb")}


def test_exceptions_from_the_linter_are_needed():
    "A file that keeps to one statement a line and 100 columns has no exception in pyproject.toml."
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    rules = ["--isolated", "--select", "E501,E702", "--line-length", "100"]
    command = ["ruff", "check", *rules, "--output-format", "json", "flashmorph", "tests", "docs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    offences = {(found["filename"].removeprefix(f"{ROOT}/"), found["code"])
                for found in json.loads(done.stdout)}
    for pattern, codes in lint["lint"]["per-file-ignores"].items():
        for code in codes:
            offenders = [name for name, found in offences if found == code]
            assert fnmatch.filter(offenders, pattern), f"{pattern} no longer needs {code}"


# The front page

def statements(source: str) -> list[str]:
    "The statements of a program, each as it is written without layout and comments."
    return [ast.unparse(node) for node in ast.parse(source).body]


def computed(source: str) -> set[str]:
    "Every statement and every expression of a program."
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt | ast.expr)]
    return set(map(ast.unparse, nodes))


def test_the_first_tutorial_runs_the_lines_of_the_front_page():
    "README and site claim it."
    page = read(ROOT / "nbs/index.ipynb")
    tutorial = read(ROOT / "nbs/tutorials/01_five_minutes.ipynb")
    text = "\n".join(source for _, source in page.cells)
    lines = statements(re.search(r"```python\n(.*?)```", text, re.S)[1])
    run = computed("\n".join(tutorial.code))
    assert len(lines) > 5
    assert not [line for line in lines if line not in run]


# What exported code may hold

@every_chapter
def test_no_star_imports_and_no_patch(nb):
    for node in nb.nodes:
        stars = isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
        assert not stars, ast.unparse(node)
        for mark in map(ast.unparse, getattr(node, "decorator_list", [])):
            patch = re.match(r"(\w+\.)*patch(_\w+)?\b", mark)
            assert not patch, f"@patch on {node.name}: put it in its class"


@every_chapter
def test_import_cells_hold_only_imports(nb):
    for source in nb.exported:
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
        assert len(kinds) < 2, f"imports and other code in one cell:\n{source}"


# Outputs and files

MACHINE = {"absolute path": MACHINE_PATH, "memory address": ADDRESS,
           "widget state": r"widget-state\+json", "progress bar": r"%\|[^\"]*\[\d"}


@every
def test_outputs_are_small_and_say_nothing_of_the_machine(nb):
    if nb.module: assert len(nb.text.encode()) < 150_000
    outputs = json.dumps([cell.get("outputs", []) for cell in nb.json["cells"]])
    for what, pattern in MACHINE.items():
        found = re.search(pattern, outputs)
        around = outputs[max(found.start() - 40, 0):found.end() + 40] if found else ""
        assert not found, f"{what} in an output: …{around}…"
    assert "widgets" not in nb.json["metadata"], "widget state in the notebook's metadata"


@cache
def files() -> list[str]:
    "The files in git and those that are about to be."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_outside_the_frame():
    top = {name.split("/")[0] for name in files()}
    assert {"settings.ini", "setup.py", "nbs", "flashmorph", "tests", "docs"} <= top
    assert not {name for name in top - FRAME if not name.startswith(".")}


def test_no_machine_paths_or_registry_hosts():
    for name in files():
        try: text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError: continue               # weights and pictures
        found = re.search(f"{MACHINE_PATH}|{REGISTRY}", text)
        assert not found, f"{name}: {found[0]}"


# The package as it is imported

IMPORT = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
before, start = set(sys.modules), time.process_time()
import flashmorph
print(time.process_time() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def import_once() -> list[str]:
    "Seconds of an import in a clean interpreter, and the packages that it brings in."
    command = [sys.executable, "-c", IMPORT]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_import_is_light():
    """Beyond torch and transformers: nothing heavy, and at most a second of processor time, so
    that a busy machine changes little."""
    runs = [import_once() for _ in range(3)]
    assert not LIGHT & {name for _, *names in runs for name in names}
    assert statistics.median(float(seconds) for seconds, *_ in runs) <= 1.0


def test_public_names_are_what_a_user_calls():
    "`flashmorph.data.text` is the function, even though a module of that name exists."
    import flashmorph
    assert all(callable(getattr(flashmorph, name)) for name in flashmorph.__all__)


def test_every_pin_takes_the_oldest_python():
    "A version that needs a later 3.11 than a system has ends `make` there."
    oldest = re.search(r"^min_python = (\S+)", (ROOT / "settings.ini").read_text(), re.M)[1] + ".0"
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    wanted = {one.metadata["Name"].lower().replace("_", "-"): one.metadata["Requires-Python"]
              for one in distributions()}
    known = {name: wanted.get(name.lower().replace("_", "-")) for name in pins}
    assert sum(known[name] is not None for name in pins) > len(pins) / 2
    too_new = {name: need for name, need in known.items()
               if need and not SpecifierSet(need).contains(oldest)}
    assert not too_new
