"The notebooks, read for the checks of the project rules."
import ast
import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"

# Files that do not keep the rules of typesetting yet. The list only shrinks: a file that keeps
# them has to be taken off.
NOT_YET: set[str] = set()


@dataclass(frozen=True)
class Notebook:
    "What the rules need to know of a notebook."
    name: str
    text: str

    @cached_property
    def json(self) -> dict: return json.loads(self.text)

    @property
    def cells(self) -> list[tuple[str, str]]:
        "Type and source of each cell."
        return [(cell["cell_type"], "".join(cell["source"])) for cell in self.json["cells"]]

    @property
    def code(self) -> list[str]:
        "The sources of the code cells."
        return [source for kind, source in self.cells if kind == "code"]

    @cached_property
    def exported(self) -> list[str]:
        "The sources of the cells that the module is made of."
        return [source for source in self.code if is_exported(source)]

    @property
    def module(self) -> str | None:
        "The module that the notebook writes, without the package."
        found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(self.code), re.M)
        return found[1] if found else None

    @property
    def number(self) -> int | None:
        "The number that the file name begins with: its place in the order."
        found = re.match(r"(\d+)_", self.name.rpartition("/")[2])
        return int(found[1]) if found else None

    @cached_property
    def nodes(self) -> list[ast.AST]:
        "Everything in the syntax trees of the exported cells."
        return [node for source in self.exported for node in ast.walk(ast.parse(source))]


def is_exported(source: str) -> bool:
    "Whether a code cell goes into the module."
    return bool(re.search(r"^#\|\s*exports?\b", source, re.M))


def is_imports(source: str) -> bool:
    "Whether a cell holds imports and nothing else."
    try: body = ast.parse(source).body
    except SyntaxError: return False                      # shell commands and magics
    return bool(body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in body)


def lines_of(source: str) -> list[str]:
    "The lines of a cell that a reader reads: neither empty ones nor directives."
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def read(path: Path) -> Notebook:
    return Notebook(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))


def hidden(path: Path) -> bool:
    "Whether a file or a folder above it is hidden from nbdev."
    return any(part.startswith((".", "_")) for part in path.relative_to(NBS).parts)


BOOK = [read(path) for path in sorted(NBS.rglob("*.ipynb")) if not hidden(path)]
CHAPTERS = [notebook for notebook in BOOK if notebook.module]
