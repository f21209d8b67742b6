"Write README.md from nbs/index.ipynb, so that the front page is a notebook like every other."
import json
import os.path
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\]\((?!\w+:|#)([^)\s]+)\)")      # a Markdown link to a file
DIRECTIVE = re.compile(r"^#\|.*\n?", re.M)


def from_root(text: str) -> str:
    "Relative links of a notebook in nbs/, as seen from the root."
    def link(found: re.Match) -> str: return f"]({os.path.normpath(f'nbs/{found[1]}')})"
    return LINK.sub(link, text)


def printed(output: dict) -> str:
    "What an output shows as text."
    text = output.get("text") or output.get("data", {}).get("text/plain", "")
    return "".join(text).rstrip()


def shown(cell: dict) -> str:
    "One cell as Markdown: prose as it is, code fenced, followed by what it printed."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return from_root(source)
    if re.search(r"^#\|\s*hide\b", source, re.M): return ""
    code = DIRECTIVE.sub("", source).strip()
    blocks = [f"```text\n{text}\n```" for text in map(printed, cell["outputs"]) if text]
    echo = not re.search(r"^#\|\s*echo:\s*false\b", source, re.M)
    return "\n\n".join([f"```python\n{code}\n```", *blocks] if echo else blocks)


def readme(notebook: Path) -> str:
    "The text of README.md."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(filter(None, map(shown, cells))) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(ROOT / "nbs/index.ipynb"), encoding="utf-8")
