"""Draws what runs logged over their steps, side by side; and says when each reached a level.

  python scripts/curves.py --workdir=runs/mnist/flow_matching --workdir=runs/mnist/mean_flow
  python scripts/curves.py --workdir=runs/a --workdir=runs/b --metrics=error,fid_quick \\
      --levels=20,10,5 --out=runs/curves.png
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from pipelines import curves
from utils import cli

cli.define_flags(curves.Options)


def main(_) -> None:
    """Runs → picture and table."""
    options = cli.read_flags(curves.Options)
    print(curves.draw(options), end="\n" if options.levels else "")
    print(f"written to {options.out}")


if __name__ == "__main__":
    cli.run(main)
