"""Runs the cells of docs/walkthrough.ipynb in order, as a notebook's kernel would, and puts what they show into the file.

    python deploy/walkthrough.py          in a new folder; writes docs/walkthrough.ipynb

A cell is plain Python: what it prints is its output, and so is its last expression, as a picture if it is one. So neither the
notebook nor its test needs Jupyter; whoever has it opens the same file there.
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "walkthrough.ipynb"


def executed(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`notebook` with the outputs of its cells, run with `folder` as the current one. An error in a cell is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    before, number = Path.cwd(), 0
    os.chdir(folder)
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                number += 1
                cell |= {"execution_count": number, "outputs": _outputs("".join(cell["source"]), names, number)}
    finally:
        os.chdir(before)
    return notebook


def _outputs(source: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    printed, value = io.StringIO(), None
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), names)  # noqa: S102  the cells of our own notebook
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)  # noqa: S307
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)})
    if value is not None:
        outputs.append(
            {"data": _shown(value), "execution_count": number, "metadata": {}, "output_type": "execute_result"}
        )
    return outputs


def _shown(value: Any) -> dict[str, Any]:
    """A value as notebooks keep it: as text, and as a picture if it is one."""
    data: dict[str, Any] = {}
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode()
    return data | {"text/plain": [type(value).__name__ if data else repr(value)]}


def main() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        executed(notebook, Path(folder))
    NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK}: {NOTEBOOK.stat().st_size // 1000} kB", file=sys.stderr)


if __name__ == "__main__":
    main()
