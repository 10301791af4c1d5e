"""The notebooks run from top to bottom, and are stored as they ran.

Their own assertions hold what their text says; here is what they cannot say of themselves.
"""

import base64
import io
import pathlib
import re

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image

from notebooks.execute import cleaned, execute
from tests.conftest import thorough

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = {"tour": 11, "sample": 11}
FOLDERS = {"tour": ROOT, "sample": ROOT / "notebooks"}  # both find the checkout's root
MOST_BYTES = 1_000_000


def stored(name: str) -> NotebookNode:
    return nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shapes(cell: NotebookNode) -> list[tuple]:
    """The kinds of a cell's outputs: what stays where numbers and pixels differ by rounding."""
    return [(o.output_type, o.get("name"), sorted(o.get("data", {}))) for o in cell.outputs]


def figures(notebook: NotebookNode) -> list[np.ndarray]:
    """The pictures, uint8 (H, W, 3)."""
    found = [
        o.data.get("image/png") for c in code_cells(notebook) for o in c.outputs if "data" in o
    ]
    files = [io.BytesIO(base64.b64decode(png)) for png in found if png]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def check_figures(name: str, notebook: NotebookNode) -> None:
    pictures = figures(notebook)
    assert len(pictures) == FIGURES[name]
    for picture in pictures:
        drawn = (picture < 250).any(axis=2).mean()
        assert 0.01 < drawn < 0.95 and max(picture.shape) > 250


@pytest.mark.timeout(900)  # a minute on two quiet cores
@pytest.mark.parametrize("name", ["tour", pytest.param("sample", marks=thorough)])
def test_a_notebook_runs_and_gives_what_is_stored(name):
    before = stored(name)
    # Sampling compiles more than it computes; training does not.
    flags = "--xla_backend_optimization_level=0" if name == "sample" else ""
    after = execute(ROOT / "notebooks" / f"{name}.ipynb", FOLDERS[name], flags)
    check_figures(name, after)
    assert [shapes(c) for c in code_cells(after)] == [shapes(c) for c in code_cells(before)]


@pytest.mark.parametrize("name", FIGURES)
def test_what_is_stored_is_a_whole_run_and_nothing_of_the_machine(name):
    notebook = stored(name)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {(o.output_type, o.get("name")) for c in code_cells(notebook) for o in c.outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None)}
    assert all(not cell.metadata for cell in notebook.cells)
    assert notebook.metadata.language_info == {"name": "python"}
    assert all(re.fullmatch("[a-z-]+", cell.id) for cell in notebook.cells)
    assert (ROOT / "notebooks" / f"{name}.ipynb").stat().st_size < MOST_BYTES
    check_figures(name, notebook)


def test_a_cell_that_fails_fails_the_run(tmp_path):
    notebook = new_notebook(cells=[new_code_cell("import os"), new_code_cell("assert 1 == 2")])
    nbformat.write(notebook, tmp_path / "a.ipynb")
    with pytest.raises(CellExecutionError, match="1 == 2"):
        execute(tmp_path / "a.ipynb", tmp_path)


def test_equal_runs_are_stored_equal():
    texts = [["a\n", "b\n"], ["a\nb\n"]]
    cells = [
        new_code_cell(
            "1",
            id="a",
            metadata={"execution": {"iopub.execute_input": f"at {i}"}},
            outputs=[new_output("stream", name="stdout", text=text) for text in parts],
        )
        for i, parts in enumerate(texts)
    ]
    first, second = (cleaned(new_notebook(cells=[cell])) for cell in cells)
    assert first == second
    assert first.cells[0].outputs[0].text == "a\nb\n"
