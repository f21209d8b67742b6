"""Execute notebooks in place, as they are kept in git: `python docs/execute.py NOTEBOOK ...`.

Progress bars are dropped, the printed lines of a cell are one output however they arrived, no state
of widgets is stored, and the notebook is cleaned as `nbdev_clean` does it."""
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbdev.clean import nbdev_clean

BAR = re.compile(r"(%\|.*|\d\w+ )\[\d\d:\d\d[<,].*\]")  # what a progress bar leaves behind


def is_bar(output: dict) -> bool:
    "Whether an output is a progress bar."
    data = output.get("data", {}).get("text/plain", "")
    return bool(BAR.search("".join(data) + "".join(output.get("text", ""))))


def execute(path: Path) -> None:
    "Run one notebook in its own folder and write it back."
    notebook = nbformat.read(path, 4)
    notebook.metadata.pop("widgets", None)
    where = {"metadata": {"path": path.parent}}
    client = NotebookClient(notebook, kernel_name="python3", timeout=None, resources=where,
                            store_widget_state=False, coalesce_streams=True)
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not is_bar(output)]
    nbformat.write(notebook, path)
    nbdev_clean(str(path))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
        print(name)
