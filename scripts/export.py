"""Writes a trained network as a folder of its own: config.json, card.json, model.safetensors.

  python scripts/export.py --workdir=runs/demo/mean_flow --out=exported/digits --dtype=float16 \\
      --licence=mit --results=runs/demo/results.json

A model card, README.md, goes with it. `eval_fid.py --workdir=FOLDER`, `sample.py --workdir=FOLDER`
and `FlowPipeline.from_pretrained(FOLDER)` read it; export_diffusers.py writes one for PyTorch.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from pipelines import export
from utils import cli

cli.define_flags(export.Options)


def main(_) -> None:
    """Run → folder."""
    options = cli.read_flags(export.Options)
    export.write(options)
    print(f"written to {options.out}")


if __name__ == "__main__":
    cli.run(main)
