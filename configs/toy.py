"""Points in the plane: a distribution to watch a flow on, in a minute.

  python train_flow.py --config=configs/toy.py:checkerboard
  python train_meanflow.py --config=configs/toy.py:checkerboard
  python eval_fid.py --workdir=runs/checkerboard/flow_matching \\
      --workdir=runs/checkerboard/mean_flow --steps=1,32 --out=runs/checkerboard

Variants: checkerboard, two_moons, spirals, swiss_roll, eight_gaussians, pinwheel.
"""

from ml_collections import ConfigDict

from configs import base

VARIANTS = ("checkerboard", "two_moons", "spirals", "swiss_roll", "eight_gaussians", "pinwheel")


def get_config(variant: str = "checkerboard") -> ConfigDict:
    """A residual MLP on the distribution `variant`.

    Raises:
      ValueError: another variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f"configs/toy.py has no variant {variant!r}: one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.dataset_name = variant
    config.batch_size = 512
    config.max_steps = 4000
    config.eval_interval = 4000
    config.save_interval = 4000
    config.model.update({"name": "mlp", "depth": 3, "hidden_size": 128, "mlp_ratio": 2.0})
    config.mean_flow.update({"interval_share": 0.5})
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 100})
    config.ema.update({"decay": 0.998})
    config.sample.update({"num": 4096})
    return config
