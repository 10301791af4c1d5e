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
    config.max_steps = 3000
    config.eval_interval = 3000
    config.save_interval = 3000
    config.model.update({"name": "mlp", "depth": 3, "hidden_size": 128, "mlp_ratio": 2.0})
    # Edges form at small t, which a logit-normal law seldom draws. In two dimensions errors differ
    # much between samples, so that weighting by them (p = 1) would pull points into clumps.
    config.flow_matching.update({"time_law": "uniform"})
    for section in ("mean_flow", "improved_mean_flow", "alpha_flow"):
        config[section].update({"time_law": "uniform", "interval_share": 0.5, "p": 0.0})
    config.optimizer.update({"lr": 2e-3, "warmup_steps": 100, "schedule": "cosine"})
    config.ema.update({"decay": 0.998})
    config.sample.update({"num": 4096})
    return config
