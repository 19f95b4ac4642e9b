"""Runs a notebook's code cells without Jupyter. `python -m tests.notebook FILE` writes the outputs into the file."""

import ast
import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    """A notebook as JSON holds it."""
    notebook: Notebook = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def source(cell: dict[str, Any]) -> str:
    """A cell's text, which the format keeps as one string or as lines."""
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def execute(notebook: Notebook) -> Notebook:
    """Run the code cells in one namespace. Returns the notebook with what they printed and showed; errors propagate."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = [dict(cell) for cell in notebook["cells"]]
    for count, cell in enumerate((cell for cell in cells if cell["cell_type"] == "code"), 1):
        cell |= {"execution_count": count, "outputs": _run(source(cell), namespace, count)}
    return {**notebook, "cells": cells}


def _run(code: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Run one cell; a last line that is an expression is shown, as in Jupyter."""
    tree, shown = ast.parse(code), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"<cell {count}>", "exec"), namespace)  # noqa: S102 (our own notebook)
        if isinstance(last, ast.Expr):
            shown = eval(compile(ast.Expression(last.value), f"<cell {count}>", "eval"), namespace)  # noqa: S307
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        outputs.append({"output_type": "stream", "name": "stdout", "text": text.splitlines(keepends=True)})
    if shown is not None:
        data: dict[str, Any] = {"text/plain": [repr(shown)]}
        if hasattr(shown, "_repr_png_"):
            data["image/png"] = base64.b64encode(shown._repr_png_()).decode()
        outputs.append({"output_type": "execute_result", "execution_count": count, "metadata": {}, "data": data})
    return outputs


def main() -> None:
    """Execute a notebook where it lies, and write its outputs into it."""
    os.environ["MPLBACKEND"] = "Agg"
    path = Path(sys.argv[1])
    executed = execute(read(path))
    path.write_text(json.dumps(executed, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
