"""Your own pictures: a folder or a zip of them, in one folder per class or flat.

python train_flow.py --config=configs/folder.py --data_dir=pictures --image_size=64
python train_meanflow.py --config=configs/folder.py --data_dir=pictures.zip --image_size=64
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A DiT of 33 million parameters on 16×16 patches at 64 pixels, with flips."""
    config = base.get_config()
    config.dataset_name = "folder"
    config.image_size = 64
    config.flip = True
    config.batch_size = 128
    config.model.update({"size": "S/4"})
    config.optimizer.update({"lr": 2e-4, "warmup_steps": 1000})
    config.ema.update({"decay": 0.9995})
    return config
