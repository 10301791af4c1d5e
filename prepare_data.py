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
    # two processes at once, each with its share of the work, on one machine or on two; those of a
    # TPU pod or of a SLURM step share it by themselves
    python prepare_data.py --source=... --out=data/imagenet256 --share=0/2
    python prepare_data.py --source=... --out=data/imagenet256 --share=1/2
    # originals beside reconstructions and the latents' channels, during the work or after it
    python prepare_data.py --out=data/imagenet256 --report
    # reference statistics for FID, of pictures that need not be prepared
    python prepare_data.py --source=imagenet2012 --statistics=imagenet256_tf.npz

A run that was interrupted goes on when the same command is run again: what is finished stays, and
nothing is lost or doubled. A corrupt picture stops the work, unless --skip_corrupt is given.
"""

from collections.abc import Sequence

from absl import flags

from pipelines import prepare, prepare_report, prepare_statistics
from utils import cli, hosts

cli.define_flags(prepare.Plan)
cli.define_flags(prepare_statistics.Wanted)
cli.define_flags(hosts.Hosts)
REPORT = flags.DEFINE_boolean("report", False, "Writes report.md and report.png into --out.")


def main(_: Sequence[str]) -> None:
    """Makes what is missing; --report or --statistics alone only look at what is there."""
    hosts.join(cli.read_flags(hosts.Hosts))
    plan = cli.read_flags(prepare.Plan)
    wanted = cli.read_flags(prepare_statistics.Wanted)
    if (plan.source and plan.out) or not (REPORT.value or wanted.statistics):
        tell(prepare.prepare(plan))
    if REPORT.value and hosts.first():
        tell(f"written: {prepare_report.write(plan)}")
    if wanted.statistics:
        tell(f"written: {prepare_statistics.write(wanted, plan)}")


def tell(line: str) -> None:
    """Prints a line, once for all processes."""
    if hosts.first():
        print(line)


if __name__ == "__main__":
    cli.run(main)
