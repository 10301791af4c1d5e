"""Trains flow matching.

  python train_flow.py                                              # digits, on any machine
  python train_flow.py --config=configs/mnist.py --workdir=runs/mnist/flow_matching
  python train_flow.py --dataset_name imagenet256 --wandb.name DiT-B --model.depth 12 \\
      --model.hidden_size 768 --model.patch_size 2 --model.num_heads 16 --model.mlp_ratio 4 \\
      --batch_size 512

The same command again continues a run that was cut short. configs/base.py lists every key.
"""

from utils import cli, hosts

CONFIG, WORKDIR = cli.define_run_flags()
cli.define_flags(hosts.Hosts)


def main(_) -> None:
    """Config → objective → fit."""
    hosts.join(cli.read_flags(hosts.Hosts), saves=True)
    from pipelines import objectives
    from pipelines.train import train

    train(CONFIG.value, WORKDIR.value, objectives.flow_objective)


if __name__ == "__main__":
    cli.run(main)
