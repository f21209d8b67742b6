"The rules of the house (CONTRIBUTING.md), checked on what is in git and on what is about to be."
import ast
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

# Notebooks that export nothing: pages to read.
PAGES = {"index.ipynb", "benchmarks.ipynb"}
FRAME = {"settings.ini", "setup.py", "nbs", "flashmorph", "tests", "docs", "README.md", "LICENSE", "CONTRIBUTING.md", "CHANGELOG.md",
         "Makefile", "MANIFEST.in", "constraints.txt", "pyproject.toml"}
LIGHT = {"plotly", "fla", "triton", "datasets", "ipywidgets", "anywidget", "nbdev"}  # what `import flashmorph` must not bring in

MACHINE_PATH = r"(?<![\w.:/-])/(?:home|root|tmp|work|Users|opt|mnt)/\w"
REGISTRY = r"\bpypi\.(?:org)|files\.python(?:hosted)|registry\.(?:npmjs)|deb\.(?:debian)"
ADDRESS = r"\b0x[0-9a-fA-F]{6,}\b"


def notebook_files() -> list[Path]:
    return sorted(p for p in NBS.rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(NBS).parts))


class Notebook:
    "What the rules need to know of a notebook."
    def __init__(self, path: Path):
        self.path, self.name = path, path.relative_to(NBS).as_posix()
        self.json = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [(c["cell_type"], "".join(c["source"]), c) for c in self.json["cells"]]
        self.code = [source for kind, source, _ in self.cells if kind == "code"]
        self.exported = [source for source in self.code if re.search(r"^#\|\s*exports?\b", source, re.M)]
        found = [m[1] for source in self.code if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M))]
        self.module = found[0] if found else None
        number = re.match(r"(\d+)_", path.name)
        self.number = int(number[1]) if number else None

    def nodes(self): return (node for source in self.exported for node in ast.walk(ast.parse(source)))


BOOK = [Notebook(path) for path in notebook_files()]
CHAPTERS = [nb for nb in BOOK if nb.module]
NUMBER = {nb.module: nb.number for nb in CHAPTERS}
every = pytest.mark.parametrize("nb", BOOK, ids=lambda nb: nb.name)
every_chapter = pytest.mark.parametrize("nb", CHAPTERS, ids=lambda nb: nb.name)


def modules_imported(node: ast.AST) -> list[str]:
    "Modules of ours that an import statement names: `from flashmorph.ops.chunked import lightning` -> `ops.chunked`."
    if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        source = "flashmorph." * (node.level > 0) + "." * node.level + (node.module or "")
        inside = source.startswith("flashmorph.") and source[11:] not in NUMBER  # `from flashmorph.ops import chunked`
        names = [f"{source}.{alias.name}" if inside else source for alias in node.names]
    else: return []
    return [name.removeprefix("flashmorph").removeprefix(".") for name in names if f"{name}.".startswith("flashmorph.")]


@every
def test_opens_with_title_and_description(nb):
    kind, source, _ = nb.cells[0]
    assert kind == "markdown" and re.match(r"# \S.*\n\n> \S", source), "the first cell is `# title`, an empty line, `> one sentence`"
    assert nb.module or nb.name in PAGES or nb.name.startswith("tutorials/"), "no default_exp, and not in PAGES"
    assert nb.module or not nb.exported, "exported cells but no default_exp"


@every_chapter
def test_imports_only_smaller_numbers(nb):
    assert nb.number is not None, "a chapter's file name begins with its number"
    for node in nb.nodes():
        for module in modules_imported(node):
            assert module in NUMBER, f"no notebook exports that; write `from flashmorph.module import name`: {ast.unparse(node)}"
            assert NUMBER[module] < nb.number, f"{nb.number:02} imports {NUMBER[module]:02}: {ast.unparse(node)}"


def test_chapters_have_their_own_numbers_and_modules():
    for what in ([nb.number for nb in CHAPTERS], [nb.module for nb in CHAPTERS]): assert len(set(what)) == len(what), sorted(what)


@every_chapter
def test_exported_cells_fit_a_screen(nb):
    for source in nb.exported:
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
        assert len(lines) <= (90 if "@triton.jit" in source else 45), f"{len(lines)} lines: {lines[0]}"


@every_chapter
def test_no_star_imports_and_no_patch(nb):
    for node in nb.nodes():
        stars = isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names)
        assert not stars, ast.unparse(node)
        for decorator in getattr(node, "decorator_list", []):
            assert not re.match(r"(\w+\.)*patch(_\w+)?\b", ast.unparse(decorator)), f"@patch on {node.name}: put it in its class"


@every_chapter
def test_import_cells_hold_only_imports(nb):
    for source in nb.exported:
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
        assert len(kinds) < 2, f"imports and other code in one cell:\n{source}"


@every
def test_outputs_are_small_and_say_nothing_of_the_machine(nb):
    if nb.module: assert nb.path.stat().st_size < 150_000, f"{nb.path.stat().st_size // 1000} KB"
    outputs = json.dumps([c.get("outputs", []) for *_, c in nb.cells])
    for what, pattern in (("absolute path", MACHINE_PATH), ("memory address", ADDRESS), ("widget state", r"widget-state\+json"),
                          ("progress bar", r"%\|[^\"]*\[\d")):
        found = re.search(pattern, outputs)
        assert not found, f"{what} in an output: …{outputs[max(found.start() - 40, 0):found.end() + 40]}…"
    assert "widgets" not in nb.json["metadata"], "widget state in the notebook's metadata"


def files() -> list[str]:
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
        except UnicodeDecodeError: continue  # weights and pictures
        found = re.search(f"{MACHINE_PATH}|{REGISTRY}", text)
        assert not found, f"{name}: {found[0]}"


IMPORT = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
before, start = set(sys.modules), time.process_time()
import flashmorph
print(time.process_time() - start, *{name.split(".")[0] for name in set(sys.modules) - before})
"""


def test_import_is_light():
    "Beyond torch and transformers: nothing heavy, and at most a second of processor time, so that a busy machine changes little."
    runs = [subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert not LIGHT & {name for _, *names in runs for name in names}
    assert statistics.median(float(seconds) for seconds, *_ in runs) <= 1.0


def test_public_names_are_what_a_user_calls():
    "`flashmorph.data.text` is the function, even though a module of that name exists."
    import flashmorph
    assert all(callable(getattr(flashmorph, name)) for name in flashmorph.__all__)
