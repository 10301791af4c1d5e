"""MNIST, 28×28. `--data_dir` names mnist.npz or a TFDS folder that holds mnist.

python train_flow.py --config=configs/mnist.py --data_dir=data/mnist.npz
python train_meanflow.py --config=configs/mnist.py --data_dir=data/mnist.npz
python train_meanflow.py --config=configs/mnist.py:small --data_dir=data/mnist.npz  # half an hour
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "") -> ConfigDict:
    """A DiT on 14×14 patches for a GPU; `small`: on 7×7 patches, for CPU cores.

    Raises:
      ValueError: another variant.
    """
    config = base.get_config()
    config.dataset_name = "mnist"
    config.optimizer.update({"lr": 6e-4, "warmup_steps": 500})
    config.sample.update({"num": 100})
    if variant == "":
        config.batch_size = 256
        config.max_steps = 50_000
        config.model.update({"depth": 8, "hidden_size": 256, "patch_size": 2, "num_heads": 4})
        config.ema.update({"decay": 0.9995})
    elif variant == "small":
        config.batch_size = 128
        config.max_steps = 2500
        config.eval_interval = 500
        config.save_interval = 250
        config.model.update({"depth": 4, "hidden_size": 96, "patch_size": 4, "num_heads": 4})
        config.model.update({"unroll": 4})
        config.optimizer.update({"lr": 1e-3, "warmup_steps": 100})
        config.ema.update({"decay": 0.995})
    else:
        raise ValueError(f"configs/mnist.py has no variant {variant!r}: leave it out, or :small")
    return config
