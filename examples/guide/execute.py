"""Runs notebooks from top to bottom and keeps what they show in their files.

python examples/guide/execute.py                                  # the three of this folder
python examples/guide/execute.py examples/guide/lora_python.ipynb
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent


def execute(notebook: NotebookNode, *, folder: Path, timeout: int = 3600) -> NotebookNode:
    """Run all cells in a fresh kernel that works in `folder`; the outputs are then in the notebook.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed.
    """
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [tidy(output) for output in cell.outputs if is_kept(output)]
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def is_kept(output: NotebookNode) -> bool:
    """Progress on standard error says nothing to who reads the file later."""
    return not (output.output_type == "stream" and output.name == "stderr")


def tidy(output: NotebookNode) -> NotebookNode:
    """Whatever a line was overwritten with is the line; a home folder is nobody's business."""
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text).replace(str(Path.home()), "~")
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(FOLDER.glob("*.ipynb")))
    for path in parser.parse_args().notebooks:
        print(f"{path.name} …", flush=True)
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(execute(notebook, folder=path.parent), path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
