"""CIFAR-10, 32×32 pixels, with the U-Net of DDPM++'s size that MeanFlow was published with.

  make setup EXTRAS=prepare
  .venv/bin/python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10', \
      data_dir='data', file_format='array_record').download_and_prepare()"
  python train_flow.py --config=configs/cifar10.py --data_dir=data
  python train_meanflow.py --config=configs/cifar10.py:meanflow --data_dir=data
  python eval_fid.py --workdir=runs/cifar10/flow_matching --workdir=runs/cifar10/mean_flow \
      --steps=1,2,32 --out=runs/cifar10

--data_dir may also name a folder or a .zip of the pictures, in one folder per class or flat. They
are kept in the host's memory, 0.2 GB.

Without a variant, flow matching with labels, of which a tenth is left out for guidance.

`meanflow` is the recipe of arXiv 2505.13447, appendix A: without labels, 55 million parameters,
1-step FID-50K 2.92 there. Its authors also augment as EDM does (--use_edm_aug in github.com/
Gsunshine/py-meanflow, scripts/cifar10_v0.sh) and tell the network of it; here pictures are mirrored
alone. Their cifar10_v1.sh draws r by a law of its own, for 2.80 in their README.

`improved` trains the same network by improved MeanFlow's objective (arXiv 2512.02012), without
guidance; nothing is published of that.

  python train_meanflow.py --config=configs/cifar10.py:improved --data_dir=data
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "") -> ConfigDict:
    """Flow matching with labels; `meanflow` or `improved`: MeanFlow's published settings.

    Raises:
      ValueError: another variant.
    """
    if variant not in ("", "meanflow", "improved"):
        raise ValueError(
            f"configs/cifar10.py has no variant {variant!r}: leave it out, :meanflow or :improved"
        )
    config = base.get_config()
    config.dataset_name = "cifar10"
    config.holdout = 0.0  # the published recipes train on the whole training set
    config.flip = True
    config.cache = "host"
    config.eval_interval = 10_000
    config.save_interval = 5_000
    config.model.update({"name": "unet", "hidden_size": 128, "depth": 4, "num_heads": 1})
    config.model.update({"channel_multipliers": (2, 2, 2), "attention_resolutions": (16,)})
    config.model.update({"resample": "fir", "dropout": 0.2})
    if variant:
        return meanflow(config, variant)
    config.batch_size = 128
    config.max_steps = 400_000
    config.flow_matching.update({"time_law": "uniform"})
    config.optimizer.update({"lr": 2e-4, "beta2": 0.999, "warmup_steps": 5_000, "clip_norm": 1.0})
    return config


def meanflow(config: ConfigDict, variant: str) -> ConfigDict:
    """MeanFlow's settings: batch 1024, Adam(0.9, 0.999), lr 6e-4, t and r by LN(−2, 2)."""
    config.batch_size = 1024
    config.max_steps = 800_000
    config.model.class_dropout_prob = 1.0  # no labels
    config.optimizer.update({"lr": 6e-4, "beta2": 0.999, "warmup_steps": 10_000})
    config.ema.update({"decay": 0.99995, "also": (0.9999, 0.9996)})
    config.sample.steps = (1, 2)
    law = {"time_mean": -2.0, "time_std": 2.0, "interval_share": 0.75, "p": 0.75, "c": 0.001}
    config.mean_flow.update(law)
    config.improved_mean_flow.update(law)
    if variant == "improved":
        config.objective = "improved_mean_flow"
    return config
