"""MNIST with a U-Net: flow matching with classifier-free guidance, as tutorials have it.

  python train_flow.py --config=configs/mnist_unet.py --data_dir=data/mnist.npz \
      --workdir=runs/mnist_unet
  python train_flow.py --config=configs/mnist_unet.py:small --data_dir=data/mnist.npz \
      --workdir=runs/mnist_unet    # 18 core-minutes
  python sample.py --workdir=runs/mnist_unet --steps=15 --sampler=euler --guidance=3

`--data_dir` names mnist.npz or a TFDS folder that holds mnist. One label in five is left out, so
that the guided velocity (arXiv 2207.12598) can be drawn with at any scale; grids in training are
drawn in 15 Euler steps at guidance 3. train_meanflow.py takes the same config.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "") -> ConfigDict:
    """A U-Net on maps of 28, 14 and 7 pixels for a GPU; `small`: for CPU cores.

    Raises:
      ValueError: another variant.
    """
    if variant not in ("", "small"):
        raise ValueError(
            f"configs/mnist_unet.py has no variant {variant!r}: leave it out, or :small"
        )
    config = base.get_config()
    config.dataset_name = "mnist"
    config.model.update({"name": "unet", "num_heads": 4, "class_dropout_prob": 0.2})
    config.sample.update({"num": 100, "steps": (15,), "guidance": 3.0})
    if variant == "small":
        config.batch_size = 32
        config.max_steps = 2000
        config.eval_interval = 500
        config.save_interval = 250
        config.model.update({"hidden_size": 16, "depth": 1, "channel_multipliers": (1, 2, 4)})
        config.optimizer.update({"lr": 2e-3, "warmup_steps": 100, "schedule": "cosine"})
        config.ema.update({"decay": 0.99})
    else:
        config.batch_size = 256
        config.max_steps = 20_000
        config.eval_interval = 2000
        config.model.update({"hidden_size": 64, "depth": 2, "channel_multipliers": (1, 2, 2)})
        config.model.update({"attention_resolutions": (14,)})
        config.optimizer.update({"lr": 5e-4, "warmup_steps": 500})
        config.ema.update({"decay": 0.9995})
    return config
