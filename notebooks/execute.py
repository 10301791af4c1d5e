"""Executes notebooks and stores them with their outputs, without what changes from run to run.

python notebooks/execute.py notebooks/tour.ipynb notebooks/sample.ipynb
"""

import base64
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbclient
import nbformat
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).parents[1]
# Settings of a test run or of a shell would make other programs, or slower ones.
UNSET = ("XLA_FLAGS", "PJRT_NPROC", "MPLBACKEND")
LONGEST = 280  # seconds of a cell


def execute(path: Path, folder: Path = ROOT, xla_flags: str = "") -> NotebookNode:
    """Runs all cells of `path` in a fresh kernel, on CPU; the file stays as it is.

    Args:
      folder: where the kernel starts.
      xla_flags: of the kernel's compiler.
    Returns:
      The notebook with its outputs, cleaned.
    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised; the message holds its source.
    """
    notebook = nbformat.read(path, as_version=4)
    with environment(xla_flags):
        client = nbclient.NotebookClient(
            notebook, timeout=LONGEST, kernel_name="python3", resources=_at(folder)
        )
        client.execute()
    return cleaned(notebook)


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """Takes out what changes from run to run, and makes figures small.

    Times of execution and the version of Python go; what a cell prints becomes one output, however
    the kernel cut it up; figures keep 256 colours, a third of their bytes.
    """
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = _small(output.data["image/png"])
    return notebook


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """The outputs, all text of one stream in the place of its first."""
    streams: dict[str, NotebookNode] = {}
    kept = []
    for output in outputs:
        if output.output_type != "stream":
            kept.append(output)
        elif output.name in streams:
            streams[output.name].text += output.text
        else:
            streams[output.name] = output
            kept.append(output)
    return kept


def _small(png: str) -> str:
    """A picture as PNG in base64, with a palette."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    file = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(file, format="png", optimize=True)
    return base64.b64encode(file.getvalue()).decode() + "\n"


@contextmanager
def environment(xla_flags: str = "") -> Iterator[None]:
    """The environment that the kernel is to inherit."""
    before = dict(os.environ)
    for name in UNSET:
        os.environ.pop(name, None)
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _at(folder: Path) -> dict:
    return {"metadata": {"path": str(folder)}}


def main(paths: list[str]) -> None:
    """Executes each notebook and writes it back."""
    for name in paths:
        nbformat.write(execute(Path(name)), name)


if __name__ == "__main__":
    main(sys.argv[1:])
