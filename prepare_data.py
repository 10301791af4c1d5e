"""Writes a data set as an autoencoder's moments, or as cropped pictures, for training to read:

    # ImageNet from TFDS, prepared as array_record: 2 × 21 GB with mirrored pictures
    python prepare_data.py --source=imagenet2012 --autoencoder=stabilityai/sd-vae-ft-mse \\
        --flip --out=data/imagenet256
    # ImageNet as a tree of class folders, n01440764/ and so on
    python prepare_data.py --source=ILSVRC2012/train --dataset_name=imagenet256 \\
        --autoencoder=stabilityai/sd-vae-ft-mse --flip --out=data/imagenet256
    # CelebA-HQ from TFDS; as pictures, for training on pixels
    python prepare_data.py --source=celeb_a_hq/256 --autoencoder=stabilityai/sd-vae-ft-mse \\
        --flip --out=data/celebahq256
    python prepare_data.py --source=celeb_a_hq/256 --autoencoder=none --out=data/celebahq256_pixels
    # pictures of your own, in a folder or a .zip; top folders, where there are, give the labels
    python prepare_data.py --source=pictures.zip --autoencoder=stabilityai/sd-vae-ft-mse \\
        --out=data/pictures
    # two processes at once, each with its share of the work, on one machine or on two
    python prepare_data.py --source=... --out=data/imagenet256 --share=0/2
    python prepare_data.py --source=... --out=data/imagenet256 --share=1/2
    # originals beside reconstructions and the latents' channels, during the work or after it
    python prepare_data.py --out=data/imagenet256 --report

A run that was interrupted goes on when the same command is run again: what is finished stays, and
nothing is lost or doubled. A corrupt picture stops the work, unless --skip_corrupt is given.
"""

from collections.abc import Sequence
from typing import Any

from absl import flags

from pipelines import prepare, prepare_report
from utils import cli

flags.DEFINE_string("source", "", "A folder or .zip of pictures, or a TFDS folder or name.")
flags.DEFINE_string("out", "", "The folder to write.")
flags.DEFINE_string(
    "autoencoder",
    "stabilityai/sd-vae-ft-mse",
    "A folder with diffusers' config.json and .safetensors (or TAESD's own pair of files), a name "
    "on the hub, or none, which keeps pictures.",
)
flags.DEFINE_enum(
    "dataset_name",
    None,
    ["folder", "imagenet256", "celebahq256"],
    "What the source's folders mean as labels; by default what the name of the source says.",
)
flags.DEFINE_string("data_dir", "", "The folder of TFDS data sets, if not the usual one.")
flags.DEFINE_string("split", "train", "Of a TFDS data set.")
flags.DEFINE_integer("image_size", 256, "Pixels of a side, which pictures are cropped to.")
flags.DEFINE_enum("dtype", "float16", ["float16", "bfloat16"], "Of the moments, as stored.")
flags.DEFINE_boolean("flip", False, "Stores the mirrored pictures' moments too.")
flags.DEFINE_enum("compute_dtype", "float32", ["float32", "bfloat16"], "Of the autoencoder.")
flags.DEFINE_integer("batch_size", 0, "Pictures at a time over all devices; 0: by their number.")
flags.DEFINE_integer("shard_size", 0, "Pictures of a shard; 0: by the number of pictures.")
flags.DEFINE_string(
    "share",
    "",
    "I/N: makes the shards k with k % N = I; each of N hosts or processes needs its own.",
)
flags.DEFINE_integer("num", 0, "Only the first so many, of one class where sorted so; 0: all.")
flags.DEFINE_boolean("skip_corrupt", False, "Leaves out pictures that cannot be read, and says so.")
REPORT = flags.DEFINE_boolean("report", False, "Writes report.md and report.png into --out.")


def main(_: Sequence[str]) -> None:
    """Makes what is missing; with --report alone, only looks at what is there."""
    values: dict[str, Any] = {name: flags.FLAGS[name].value for name in prepare.Plan._fields}
    plan = prepare.Plan(**values)
    if plan.source or not REPORT.value:
        print(prepare.prepare(plan))
    if REPORT.value:
        print(f"written: {prepare_report.write(plan)}")


if __name__ == "__main__":
    cli.run(main)
