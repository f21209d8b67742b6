"""Execute notebooks in place, as they are kept in git: `python docs/execute.py nbs/10_name.ipynb ...`.

What progress bars leave behind is dropped, printed lines of a cell are one output however they arrived, and no state of widgets is stored."""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

BAR = re.compile(r"%\|.*\[.*\]")           # what a progress bar leaves behind


def is_bar(output: dict) -> bool: return bool(BAR.search("".join(output.get("data", {}).get("text/plain", "")) + "".join(output.get("text", ""))))


def main(paths: list[str]) -> None:
    for path in map(Path, paths):
        notebook = nbformat.read(path, 4)
        notebook.metadata.pop("widgets", None)
        NotebookClient(notebook, timeout=None, kernel_name="python3", store_widget_state=False, coalesce_streams=True,
                       resources={"metadata": {"path": path.parent}}).execute()
        for cell in notebook.cells:
            if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if not is_bar(o)]
        nbformat.write(notebook, path)
        print(path)


if __name__ == "__main__": main(sys.argv[1:])
