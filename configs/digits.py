"""scikit-learn's handwritten digits, 8×8, embedded: minutes on two CPU cores.

python train_flow.py --config=configs/digits.py
python train_meanflow.py --config=configs/digits.py
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A DiT of 0.8 million parameters on 4×4 patches of 2×2 pixels."""
    config = base.get_config()
    config.dataset_name = "digits"
    config.batch_size = 128
    config.max_steps = 1000
    config.eval_interval = 500
    config.save_interval = 500
    config.model.update(
        {"depth": 4, "hidden_size": 96, "patch_size": 2, "num_heads": 4, "unroll": 4}
    )
    config.optimizer.update({"lr": 1e-3, "warmup_steps": 100})
    config.ema.update({"decay": 0.99})
    config.sample.update({"num": 100})
    return config
