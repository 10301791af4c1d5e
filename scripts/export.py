"""Writes a trained network as a folder of its own: config.json, card.json, model.safetensors.

  python scripts/export.py --workdir=runs/demo/mean_flow --out=exported/digits --dtype=float16

The averaged parameters of the newest checkpoint go out; `eval_fid.py --workdir=FOLDER` and
`FlowPipeline.from_pretrained(FOLDER)` read it.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from utils import cli

WORKDIR = flags.DEFINE_string("workdir", "", "The run's folder, or gs://BUCKET/FOLDER.")
OUT = flags.DEFINE_string("out", "", "The folder to write; it must not hold weights yet.")
AUTOENCODER = flags.DEFINE_string(
    "autoencoder", "", "Of a run on latents: its folder, if not where the run found it."
)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "Of the weights in the file.")


def main(_) -> None:
    """Run → folder."""
    from pipelines.flow import FlowPipeline
    from utils import files

    if not WORKDIR.value or not OUT.value:
        raise cli.UserError("which run, and where to? --workdir=runs/... --out=FOLDER")
    files.check_local(out=OUT.value, autoencoder=AUTOENCODER.value)
    pipeline = FlowPipeline.from_pretrained(WORKDIR.value, AUTOENCODER.value)
    pipeline.save_pretrained(OUT.value, DTYPE.value)


if __name__ == "__main__":
    cli.run(main)
