"""What the package exports, read from its source without importing it: entries for Sphinx's Python domain, and links to them.

nbdev's own `show_doc` runs every exported cell. Reading the source is faster, shows defaults as they are written, and lets
search and cross references know every function, class and method."""
import ast
import copy
import re
from dataclasses import dataclass
from pathlib import Path

FENCED = re.compile(r"(^(`{3,}).*?^\2[ ]*$)", re.M | re.S)
CODE = re.compile(r"(?<![`\w}\[])`((?:fm\.)?[A-Za-z_][\w.]*)(?:\(\))?`(?![`\w\]])")


def public(body: list[ast.stmt]) -> list:
    "Functions and classes whose names do not begin with an underscore."
    return [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not n.name.startswith("_")]


def comments(node: ast.FunctionDef, source: str) -> list[str]:
    "What comments say beside parameters and result, `x: Tensor,  # (B, T)`, as a field list."
    lines, args = source.splitlines(), [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    fields = {arg.end_lineno: f":param {arg.arg}:" for arg in args}                      # the last one on a line has the comment
    if node.returns: fields[node.returns.end_lineno] = ":returns:"
    said = {field: re.search(r"\s#\s+(.+)$", lines[line - 1]) for line, field in fields.items() if line < node.body[0].lineno}
    return [f"{field} {comment[1]}" for field, comment in said.items() if comment]


def parameters(function: ast.FunctionDef, bound: bool = False) -> str:
    "The parameters as written; `bound`: without `self` or `cls`."
    args = copy.deepcopy(function.args)
    if bound: (args.posonlyargs or args.args).pop(0)
    return ast.unparse(args)


def constructor(node: ast.ClassDef) -> str:
    "The parameters of a class: those of its `__init__`, or the fields of a dataclass."
    for f in node.body:
        if isinstance(f, ast.FunctionDef) and f.name == "__init__": return parameters(f, bound=True)
    if not any("dataclass" in ast.unparse(d) for d in node.decorator_list): return ""
    fields = [copy.deepcopy(f) for f in node.body if isinstance(f, ast.AnnAssign)]
    for f in fields:
        if isinstance(f.value, ast.Call): f.value = ast.Constant(...)                    # field(default_factory=...)
    return ", ".join(map(ast.unparse, fields))


@dataclass(frozen=True)
class Symbol:
    "A public function, class or method: the module it is in, its name there, and where it is written."
    module: str
    name: str
    node: ast.FunctionDef | ast.ClassDef
    source: str

    @property
    def full(self) -> str: return f"{self.module}.{self.name}"
    @property
    def doc(self) -> str: return ast.get_docstring(self.node) or ""
    @property
    def summary(self) -> str: return " ".join(self.doc.split("\n\n")[0].split())
    @property
    def methods(self) -> list["Symbol"]:
        "Of a class, those with a docstring or commented parameters."
        if not isinstance(self.node, ast.ClassDef): return []
        found = [Symbol(self.module, f"{self.name}.{n.name}", n, self.source) for n in public(self.node.body)]
        return [m for m in found if m.doc or comments(m.node, self.source)]

    def entry(self) -> str:
        "A directive of Sphinx's Python domain, in MyST."
        node, marks = self.node, [ast.unparse(d) for d in self.node.decorator_list]
        if isinstance(node, ast.ClassDef):
            bases = ", ".join(f"`{ast.unparse(b)}`" for b in node.bases)
            head, parts = f"{{py:class}} {self.name}({constructor(node)})", [f"Extends {bases}." if bases else "", self.doc]
            return "\n\n".join([f"::::{head}\n:module: {self.module}", *filter(None, parts), *(m.entry() for m in self.methods), "::::"])
        method, result = "." in self.name, f" -> {ast.unparse(node.returns)}" if node.returns else ""
        options = f":module: {self.module}\n" + "".join(f":{m}:\n" for m in marks if m in ("classmethod", "staticmethod"))
        head = f"{{py:{'method' if method else 'function'}}} {self.name}({parameters(node, method and 'staticmethod' not in marks)}){result}"
        if "property" in marks: head, options = f"{{py:property}} {self.name}", options + (f":type: {result[4:]}\n" if result else "")
        return "\n".join([f":::{head}", options, self.doc, "", *comments(node, self.source), ":::"])


class Index:
    "Every `Symbol` of a package, and what prose calls it."
    def __init__(self, package: Path):
        self.symbols: dict[str, Symbol] = {}
        self.modules: dict[str, tuple[str, list[Symbol]]] = {}                           # name -> description, symbols
        for path in sorted(package.rglob("*.py")):
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
            module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            found = [Symbol(module, node.name, node, source) for node in public(tree.body)]
            self.modules[module] = ast.get_docstring(tree) or "", found
            self.symbols |= {s.full: s for top in found for s in (top, *top.methods)}
            if module == package.name:                                                   # from flashmorph.model.morph import morph
                self.top = {a.name: f"{n.module}.{a.name}" for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}

    def resolve(self, name: str, module: str = "") -> str | None:
        "Full name of what prose in the chapter of `module` calls `name`: its own, else the package's, else the only one of that name."
        name = name.removeprefix("fm.").removeprefix("flashmorph.")
        head, _, rest = name.partition(".")
        for full in (f"{module}.{name}", f"{self.top.get(head, head)}.{rest}".rstrip("."), f"flashmorph.{name}"):
            if full in self.symbols: return full
        only = [full for full, s in self.symbols.items() if s.name == name]
        return only[0] if len(only) == 1 else None

    def linked(self, text: str, module: str = "") -> str:
        "Markdown in which code that names a symbol links to it. Fenced code and headings stay as they are."
        def link(m: re.Match) -> str:
            full = self.resolve(m[1], module)
            return f"{{py:obj}}`{m[0].strip('`')} <{full}>`" if full else m[0]
        def prose(part: str) -> str: return "\n".join(line if line.startswith("#") else CODE.sub(link, line) for line in part.split("\n"))
        parts = FENCED.split(text)                                                       # prose, fenced, its fence, prose, ...
        return "".join(part if i % 3 == 1 else prose(part) for i, part in enumerate(parts) if i % 3 != 2)

    def page(self, chapters: dict[str, str]) -> str:
        "The page of all symbols: first what `import flashmorph` gives, then module by module. `chapters`: module -> its page."
        def table(symbols: list[Symbol], prefix: str = "") -> str:
            rows = [f"* - {{py:obj}}`{prefix}{s.name} <{s.full}>`\n  - {self.linked(s.summary, s.module)}" for s in symbols]
            return "\n".join([":::{list-table}", ":class: api", ":widths: 25 75", "", *rows, ":::"])
        top = [self.symbols[full] for name, full in sorted(self.top.items()) if full in self.symbols]
        parts = ["# API", "What `import flashmorph as fm` gives.", table(top, "fm.")]
        for module, (description, symbols) in self.modules.items():
            if symbols and module in chapters:
                parts += [f"## {module}", f"{description} Chapter: [](<{chapters[module]}>).", table(symbols)]
        return "\n\n".join(parts) + "\n"
