"""What the package exports, read from its source without importing it.

nbdev's own `show_doc` runs every exported cell. Reading the source is faster, shows defaults as
they are written, and gives Sphinx's search and cross references every function and class."""
import ast
import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCED = re.compile(r"(^(`{3,}).*?^\2[ ]*$)", re.M | re.S)
CODE = re.compile(r"(?<![`\w}\[])`((?:fm\.)?[A-Za-z_][\w.]*)(?:\(\))?`(?![`\w\]])")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def public(body: list[ast.stmt]) -> list:
    "Functions and classes whose names do not begin with an underscore."
    kinds = Function | ast.ClassDef
    return [node for node in body if isinstance(node, kinds) and not node.name.startswith("_")]


def arguments(function: Function) -> list[ast.arg]:
    "Every parameter of a function, `*args` and `**kwargs` included."
    args = function.args
    stars = [arg for arg in (args.vararg, args.kwarg) if arg]
    return [*args.posonlyargs, *args.args, *args.kwonlyargs, *stars]


def beside(lines: list[str], line: int) -> str:
    "The comment at the end of a line, if there is one."
    comment = re.search(r"\s#\s+(.+)$", lines[line - 1])
    return comment[1] if comment else ""


def comments(node: Function | ast.ClassDef, source: str) -> list[str]:
    """The comments beside parameters, fields and result, `x: Tensor,  # (B, T)`, as a field list.

    Of several parameters on one line, the last has the comment."""
    lines = source.splitlines()
    if isinstance(node, ast.ClassDef):
        places = {field.end_lineno: f":param {ast.unparse(field.target)}:"
                  for field in fields(node)}
    else:
        places = {arg.end_lineno: f":param {arg.arg}:" for arg in arguments(node)}
        if node.returns: places[node.returns.end_lineno] = ":returns:"
        places = {line: role for line, role in places.items() if line < node.body[0].lineno}
    return [f"{role} {beside(lines, line)}" for line, role in places.items() if beside(lines, line)]


def parameters(function: Function, bound: bool = False) -> str:
    "The parameters as written; `bound`: without `self` or `cls`."
    args = copy.deepcopy(function.args)
    if bound: (args.posonlyargs or args.args).pop(0)
    return ast.unparse(args)


def init(node: ast.ClassDef) -> ast.FunctionDef | None:
    "The `__init__` that a class defines itself."
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__": return function
    return None


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    "The fields of a class that becomes a dataclass; none for other classes."
    if not any("dataclass" in ast.unparse(mark) for mark in node.decorator_list): return []
    return [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]


def default(value: ast.expr | None) -> ast.expr | None:
    "The default of a field as the documentation shows it: `setting(256, low=1)` is 256."
    if not isinstance(value, ast.Call): return value
    if ast.unparse(value.func) == "setting" and value.args: return value.args[0]
    return ast.Constant(...)                              # made anew for each object


def constructor(node: ast.ClassDef) -> str:
    "The parameters of a class: those of its `__init__`, or the fields of a dataclass."
    if function := init(node): return parameters(function, bound=True)
    shown = copy.deepcopy(fields(node))
    for field in shown: field.value = default(field.value)
    return ", ".join(map(ast.unparse, shown))


def names(node: Function | ast.ClassDef) -> set[str]:
    "What the parameters of a function or a class are called."
    if isinstance(node, ast.ClassDef):
        function = init(node)
        if function is None: return {ast.unparse(field.target) for field in fields(node)}
        return names(function)
    return {arg.arg for arg in arguments(node)}


def methods_of(node: ast.ClassDef) -> list[tuple[str, Function]]:
    "The public functions in the body of a class, by name."
    return [(inner.name, inner) for inner in public(node.body)]


def functions_as_methods(node: ast.ClassDef, source: str) -> list[tuple[str, Function]]:
    "The module's functions that the body of a class takes as methods: `record = record`."
    functions = {f.name: f for f in public(ast.parse(source).body)}
    found = []
    for line in node.body:
        if not isinstance(line, ast.Assign) or not isinstance(line.value, ast.Name): continue
        target, function = line.targets[0], functions.get(line.value.id)
        if isinstance(target, ast.Name) and isinstance(function, Function):
            found.append((target.id, function))
    return found


@dataclass(frozen=True)
class Symbol:
    """A public function, class or method: its module, its name there, and where it is written.

    `parameters` are its own and those of the class around it: in its description these names mean
    the parameters, not functions of the same name."""
    module: str
    name: str
    node: Function | ast.ClassDef
    source: str
    parameters: frozenset[str]

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
        found = []
        for called, node in [*methods_of(self.node), *functions_as_methods(self.node, self.source)]:
            if ast.get_docstring(node) or comments(node, self.source):
                inner = self.parameters | names(node)
                name = f"{self.name}.{called}"
                found.append(Symbol(self.module, name, node, self.source, inner))
        return found


def symbols_of(module: str, source: str) -> list[Symbol]:
    "The public functions and classes at the top of a module."
    found = public(ast.parse(source).body)
    return [Symbol(module, node.name, node, source, frozenset(names(node))) for node in found]


def top_names(tree: ast.Module) -> dict[str, str]:
    """What the package itself offers, name -> full name: its imports, `from a.b import c`, and
    `ON_DEMAND`, the names it looks up when they are asked for."""
    offered = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            offered |= {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ON_DEMAND":
            homes = ast.literal_eval(node.value)
            offered |= {name: f"{module}.{name}" for name, module in homes.items()}
    return offered


class Index:
    "Every `Symbol` of a package, and what prose calls it."

    def __init__(self, package: Path):
        self.symbols: dict[str, Symbol] = {}
        self.modules: dict[str, list[Symbol]] = {}
        self.descriptions: dict[str, str] = {}
        for path in sorted(package.rglob("*.py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            self._add(".".join(parts).removesuffix(".__init__"), path.read_text(encoding="utf-8"))
        tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
        self.top = top_names(tree)

    def _add(self, module: str, source: str) -> None:
        self.modules[module] = symbols_of(module, source)
        self.descriptions[module] = ast.get_docstring(ast.parse(source)) or ""
        for symbol in self.modules[module]:
            self.symbols[symbol.full] = symbol
            self.symbols |= {method.full: method for method in symbol.methods}

    def resolve(self, name: str, module: str = "") -> str | None:
        """Full name of what the chapter of `module` calls `name`: its own, else the package's,
        else the only one of that name. `None` where there is no such symbol."""
        name = name.removeprefix("fm.").removeprefix("flashmorph.")
        head, _, rest = name.partition(".")
        offered = f"{self.top.get(head, head)}.{rest}".rstrip(".")
        for full in (f"{module}.{name}", offered, f"flashmorph.{name}"):
            if full in self.symbols: return full
        only = [full for full, symbol in self.symbols.items() if symbol.name == name]
        return only[0] if len(only) == 1 else None

    def linked(self, text: str, module: str = "", but: frozenset[str] = frozenset()) -> str:
        """Markdown in which code that names a symbol links to it, except for the names in `but`.
        Fenced code and headings stay as they are."""
        def link(found: re.Match) -> str:
            full = None if found[1] in but else self.resolve(found[1], module)
            return f"{{py:obj}}`{found[0].strip('`')} <{full}>`" if full else found[0]

        def prose(part: str) -> str:
            lines = [line if line.startswith("#") else CODE.sub(link, line)
                     for line in part.split("\n")]
            return "\n".join(lines)

        parts = FENCED.split(text)                        # prose, fenced, its fence, prose, ...
        kept = [part for i, part in enumerate(parts) if i % 3 != 2]
        return "".join(part if i % 2 else prose(part) for i, part in enumerate(kept))

    def described(self, symbol: Symbol, text: str) -> str:
        "Text of a symbol's own docstring, with links."
        return self.linked(text, symbol.module, symbol.parameters)

    def entry(self, symbol: Symbol) -> str:
        "The directive of Sphinx's Python domain that describes a symbol, in MyST."
        if isinstance(symbol.node, ast.ClassDef): return self._class_entry(symbol)
        return self._function_entry(symbol)

    def _class_entry(self, symbol: Symbol) -> str:
        bases = ", ".join(f"`{ast.unparse(base)}`" for base in symbol.node.bases)
        extends = self.described(symbol, f"Extends {bases}.") if bases else ""
        head = f"::::{{py:class}} {symbol.name}({constructor(symbol.node)})"
        text = "\n".join([symbol.doc, "", *comments(symbol.node, symbol.source)]).strip()
        parts = [f"{head}\n:module: {symbol.module}", extends, self.described(symbol, text)]
        parts += map(self._function_entry, symbol.methods)
        return "\n\n".join(filter(None, [*parts, "::::"]))

    def _function_entry(self, symbol: Symbol) -> str:
        node = symbol.node
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        options = [f":module: {symbol.module}"]
        options += [f":{mark}:" for mark in marks if mark in ("classmethod", "staticmethod")]
        result = ast.unparse(node.returns) if node.returns else ""
        if "property" in marks:
            head = f"{{py:property}} {symbol.name}"
            if result: options.append(f":type: {result}")
        else:
            method = "." in symbol.name
            kind = "method" if method else "function"
            shown = parameters(node, bound=method and "staticmethod" not in marks)
            arrow = f" -> {result}" if result else ""
            head = f"{{py:{kind}}} {symbol.name}({shown}){arrow}"
        text = "\n".join([symbol.doc, "", *comments(node, symbol.source)])
        return "\n".join([f":::{head}", *options, "", self.described(symbol, text), ":::"])

    def table(self, symbols: list[Symbol], prefix: str = "") -> str:
        "A table of symbols, each with the first sentence of its description."
        rows = [":::{list-table}", ":class: api", ":widths: 25 75", ""]
        for symbol in symbols:
            rows.append(f"* - {{py:obj}}`{prefix}{symbol.name} <{symbol.full}>`")
            rows.append(f"  - {self.described(symbol, symbol.summary)}")
        return "\n".join([*rows, ":::"])

    def page(self, shelves: dict[str, dict[str, str]]) -> str:
        """The page of all symbols: first what `import flashmorph` offers, then shelf by shelf and
        module by module. `shelves`: name of a shelf -> module -> page of its chapter."""
        return "\n\n".join(self._page(shelves)) + "\n"

    def _page(self, shelves: dict[str, dict[str, str]]) -> Iterator[str]:
        yield "# API"
        yield "The names that `import flashmorph as fm` offers."
        offered = [full for _, full in sorted(self.top.items()) if full in self.symbols]
        yield self.table([self.symbols[full] for full in offered], "fm.")
        for shelf, chapters in shelves.items():
            filled = {module: page for module, page in chapters.items() if self.modules[module]}
            if filled: yield f"## {shelf}"
            for module, page in filled.items():
                yield f"### {module}"
                yield f"{self.descriptions[module]} Chapter: [](<{page}>)."
                yield self.table(self.modules[module])
