"""Trains MeanFlow (arXiv 2505.13447), or what is like it: samples in one step.

  python train_meanflow.py                                          # digits, on any machine
  python train_meanflow.py --config=configs/mnist.py --workdir=runs/mnist/mean_flow
  python train_meanflow.py --config=configs/imagenet256.py:meanflow_b4 --workdir=runs/b4

--objective chooses among mean_flow, improved_mean_flow, alpha_flow, shortcut and consistency;
docs/recipes.md compares them. An adaptive weight keeps most losses near 1: watch `error` and
`velocity_error`. The same command again continues a run that was cut short. configs/base.py lists
every key.
"""

from utils import cli, hosts

CONFIG, WORKDIR = cli.define_run_flags()
cli.define_flags(hosts.Hosts)


def main(_) -> None:
    """Config → objective → fit."""
    hosts.join(cli.read_flags(hosts.Hosts), saves=True)
    from pipelines import objectives
    from pipelines.train import train

    train(CONFIG.value, WORKDIR.value, objectives.average_objective)


if __name__ == "__main__":
    cli.run(main)
