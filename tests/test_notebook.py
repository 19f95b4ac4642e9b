"""docs/*.ipynb: valid, run from top to bottom, and kept with the outputs of a run."""

import base64
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.notebook import execute, read, source

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
SMALL = {"PRESET": "smoke", "STEPS": "3", "LR": "0.02", "DEPTHS": "8", "THREADS": "1"}
OUTPUTS = {
    "stream": {"output_type", "name", "text"},
    "execute_result": {"output_type", "execution_count", "metadata", "data"},
}
MAX_PICTURE = 100_000  # bytes


def complaints(notebook: dict[str, Any]) -> list[str]:
    """What is not as nbformat 4.5 has it (https://nbformat.readthedocs.io/en/latest/format_description.html)."""
    found = []
    if set(notebook) != {"cells", "metadata", "nbformat", "nbformat_minor"}:
        found.append(f"top level: {sorted(notebook)}")
    if (notebook.get("nbformat"), notebook.get("nbformat_minor")) != (4, 5):
        found.append("not nbformat 4.5")
    ids = [cell.get("id", "") for cell in notebook.get("cells", [])]
    if len(set(ids)) < len(ids) or not all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids):
        found.append(f"ids: {ids}")
    for cell in notebook.get("cells", []):
        code = {"execution_count", "outputs"} if cell.get("cell_type") == "code" else set()
        if cell.get("cell_type") not in ("code", "markdown") or set(cell) - code != {
            "cell_type",
            "id",
            "metadata",
            "source",
        }:
            found.append(f"{cell.get('id')}: {sorted(cell)}")
            continue
        if code - set(cell):
            found.append(f"{cell['id']}: no {code - set(cell)}")
        found += [
            f"{cell['id']}: {output.get('output_type')} with {sorted(output)}"
            for output in cell.get("outputs", [])
            if OUTPUTS.get(output.get("output_type")) != set(output)
        ]
    return found


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_it_is_a_valid_notebook(path: Path) -> None:
    notebook = read(path)
    assert complaints(notebook) == []
    for broken in (
        {**notebook, "nbformat_minor": 4},
        {**notebook, "cells": notebook["cells"] * 2},
        {**notebook, "cells": [{k: v for k, v in notebook["cells"][1].items() if k != "outputs"}]},
        {**notebook, "cells": [{**notebook["cells"][1], "outputs": [{"output_type": "stream"}]}]},
        {**notebook, "extra": 1},
    ):
        assert complaints(broken) != []


def test_it_is_kept_with_the_outputs_of_a_run_from_top_to_bottom(path: Path) -> None:
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    pictures = [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < MAX_PICTURE
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "what another seed would change is not in it" in text
    assert not re.search(r"/home|/root|/tmp|/work|Traceback|Warning", text)


def test_what_it_says_of_its_run_is_what_the_run_printed(path: Path) -> None:
    """Numbers in the text stand in an output, or are the settings and facts that are named here."""
    cells = read(path)["cells"]
    printed = "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))
    (last,) = [source(cell) for cell in cells if cell["id"] == "end"]
    numbers = re.findall(r"\d+\.\d+", last)
    assert numbers
    assert [number for number in numbers if number not in printed] == []


@pytest.mark.timeout(300)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """A few steps of the smallest nets, in a process of its own, from top to bottom."""
    copy = tmp_path / path.name
    copy.write_text(path.read_text())
    env = {**os.environ, **SMALL, "RUNS": str(tmp_path / "runs"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "tests.notebook", str(copy)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = "".join("".join(o.get("text", "")) for cell in read(copy)["cells"] for o in cell.get("outputs", []))
    assert "preset smoke, 3 steps, lr 0.02, depths [8]" in printed
    assert complaints(read(copy)) == []


def test_the_runner_shows_what_jupyter_would() -> None:
    cells = [
        {"cell_type": "markdown", "source": "not ( code"},
        {"cell_type": "code", "source": ["x = 1\n", "print(x)\n", "x + 1"]},
        {"cell_type": "code", "source": "y = x"},
    ]
    text, first, second = execute({"cells": cells})["cells"]
    assert text == cells[0]
    assert first["outputs"] == [
        {"output_type": "stream", "name": "stdout", "text": ["1\n"]},
        {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": ["2"]}},
    ]
    assert (second["execution_count"], second["outputs"]) == (2, [])
    with pytest.raises(ZeroDivisionError):
        execute({"cells": [{"cell_type": "code", "source": "1 / 0"}]})
