"""Trains recipes at equal budgets, measures them alike, and writes one table and one picture.

  python scripts/compare.py --config=configs/compare.py:digits                  # two minutes
  python scripts/compare.py --config=configs/compare.py:mnist --data_dir=mnist.npz --dry_run
  python scripts/compare.py --config=configs/compare.py:mnist --names=mean_flow,shortcut \\
      --seeds=0,1 --max_steps=5000 --workdir=runs/compare/long

A plan is a config: configs/compare.py lists its keys, and each is a flag here. It trains by
train_flow.py and train_meanflow.py, measures by eval_fid.py, and prints their commands. The same
command again goes on where it was interrupted; several jobs may share one --workdir, as those of a
SLURM array do; with a greater --max_steps the runs go on from where they are.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from ml_collections import config_flags

from pipelines import compare, compare_report
from utils import cli

CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="configs/compare.py:PLAN; --KEY=VALUE changes a key of the plan."
)
cli.define_flags(compare.Options)


def main(_) -> None:
    """Plan → runs → evaluations → table and pictures."""
    compare.use_cpu()
    options = cli.read_flags(compare.Options)
    comparison = compare.prepare(CONFIG.value, options)
    if options.dry_run:
        print(*map(compare.told, compare.commands(comparison)), sep="\n")
        return
    compare.run(comparison, options.expires)
    print(compare_report.write(comparison, options))
    print(f"written to {options.out or comparison.workdir}: results.md, .csv, .json, .png")


if __name__ == "__main__":
    cli.run(main, needed="configs/compare.py:digits, or mnist")
