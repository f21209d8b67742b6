"Write README.md from nbs/index.ipynb, so that the front page is a notebook like every other."
import json
import os.path
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def from_root(text: str) -> str:
    "Relative links of a notebook in nbs/, as seen from the root."
    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", lambda m: f"]({os.path.normpath(os.path.join('nbs', m[1]))})", text)


def shown(cell: dict) -> str:
    "One cell as Markdown: prose as it is, code fenced, followed by what it printed."
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown": return "" if source.startswith("```{toctree}") else from_root(source)
    if re.search(r"^#\|\s*hide\b", source, re.M): return ""
    code = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()
    texts = ["".join(o.get("text") or o.get("data", {}).get("text/plain", "")).rstrip() for o in cell["outputs"]]
    echo = not re.search(r"^#\|\s*echo:\s*false\b", source, re.M)
    return "\n\n".join([f"```python\n{code}\n```"] * echo + [f"```text\n{t}\n```" for t in texts if t])


if __name__ == "__main__":
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    (ROOT / "README.md").write_text("\n\n".join(filter(None, map(shown, cells))) + "\n", encoding="utf-8")
