"""Your own pictures: a folder or a zip of them, in one folder per class or flat.

  python train_flow.py --config=configs/folder.py --data_dir=pictures --image_size=64
  python train_meanflow.py --config=configs/folder.py --data_dir=pictures.zip --image_size=64

As latents of an autoencoder, at 256 pixels unless --image_size says otherwise to both:

  python prepare_data.py --source=pictures --autoencoder=stabilityai/sd-vae-ft-mse --flip \
      --out=data/pictures
  python train_flow.py --config=configs/folder.py:latents --data_dir=data/pictures
  python train_meanflow.py --config=configs/folder.py:latents --data_dir=data/pictures
  python eval_fid.py --workdir=runs/folder/flow_matching --workdir=runs/folder/mean_flow \
      --steps=1,2,4,32 --out=runs/folder    # FID-50K; a quick look: --num_samples=2000
"""

from ml_collections import ConfigDict

from configs import base


def get_config(variant: str = "") -> ConfigDict:
    """A DiT of 33 million parameters on 16×16 patches of pictures of 64 pixels, or of latents.

    Raises:
      ValueError: another variant.
    """
    if variant not in ("", "latents"):
        raise ValueError(f"configs/folder.py has no variant {variant!r}: leave it out, or :latents")
    config = base.get_config()
    config.dataset_name = "folder"
    config.use_stable_vae = int(variant == "latents")
    config.image_size = 256 if variant == "latents" else 64
    config.flip = True
    config.batch_size = 128
    config.model.update({"size": "S/2" if variant == "latents" else "S/4"})
    config.optimizer.update({"lr": 2e-4, "warmup_steps": 1000})
    config.ema.update({"decay": 0.9995})
    return config
