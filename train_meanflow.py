"""Trains MeanFlow (arXiv 2505.13447): samples in one step.

  python train_meanflow.py                                          # digits, on any machine
  python train_meanflow.py --config=configs/mnist.py --workdir=runs/mnist/mean_flow
  python train_meanflow.py --config=configs/imagenet256.py:meanflow_b4 --workdir=runs/b4

The loss stays near 1 by its adaptive weight: watch `error` and `velocity_error`. The same command
again continues a run that was cut short. configs/base.py lists every key.
"""

from absl import flags
from ml_collections import config_flags

from utils import cli

CONFIG = config_flags.DEFINE_config_file(
    "config",
    help_string="configs/NAME.py[:variant]; --config.KEY=VALUE, or --KEY VALUE, changes a key.",
)
WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; default runs/DATASET/OBJECTIVE.")


def main(_) -> None:
    """Config → objective → fit."""
    from pipelines import build
    from pipelines.train import train

    train(CONFIG.value, WORKDIR.value, build.mean_flow_objective)


if __name__ == "__main__":
    cli.run(main)
