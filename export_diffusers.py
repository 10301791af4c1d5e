"""Writes a trained network as a pipeline of PyTorch's diffusers:

    python export_diffusers.py --workdir=runs/mnist/mean_flow --out=exported/mnist --licence=mit

after which, with torch and diffusers installed, which this command needs not,

    pipe = DiffusionPipeline.from_pretrained("exported/mnist", trust_remote_code=True)
    images = pipe(class_labels=[3, 7], num_inference_steps=1).images

`--workdir` is a run, or a folder that scripts/export.py or import_weights.py wrote.
"""

import sys
from collections.abc import Sequence

from pipelines import export
from utils import cli

cli.define_flags(export.Options)


def main(_: Sequence[str]) -> None:
    """Run → folder."""
    options = cli.read_flags(export.Options)
    pipeline = export.load(options)
    for line in export.write_diffusers(pipeline, options.out, options.dtype):
        print(f"warning: {line}", file=sys.stderr)
    print(f"written to {options.out}")


if __name__ == "__main__":
    cli.run(main)
