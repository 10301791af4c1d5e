"""CelebA-HQ at 256×256, without labels, as latents of the Stable Diffusion VAE or as pixels.

  python prepare_data.py --source=celeb_a_hq/256 --autoencoder=stabilityai/sd-vae-ft-mse --flip \
      --out=data/celebahq256    # or --source=FOLDER --dataset_name=celebahq256
  python train_flow.py --config=configs/celebahq256.py --data_dir=data/celebahq256
  python train_meanflow.py --config=configs/celebahq256.py --data_dir=data/celebahq256
  python eval_fid.py --workdir=runs/celebahq256/flow_matching \
      --workdir=runs/celebahq256/mean_flow --steps=1,2,4,32 --out=runs/celebahq256

Flow matching is jax-flow's recipe (FID-50K 28.7 at 100 steps in its README); MeanFlow has the same
network, data and optimiser. `pixels` trains on pixels in patches of 8, jax-flow's
`--model.patch_size 8 --use_stable_vae 0`, on a folder, a .zip, a folder that TFDS prepared, or what
prepare_data.py --autoencoder=none wrote:

  python train_flow.py --config=configs/celebahq256.py:pixels --data_dir=FOLDER

Variants of shortcut models (arXiv 2410.12557), with the settings of the authors' code: shortcut_b2
(FID-50K of 128, 4 and 1 steps in their README: 6.9, 13.8, 20.5) and shortcut_xl2, of which none was
published. Their targets come from averaged parameters and, by default, their samples from the
parameters themselves (--ema=none); ours the other way round.

  python train_meanflow.py --config=configs/celebahq256.py:shortcut_b2 --data_dir=data/celebahq256
  python eval_fid.py --workdir=runs/celebahq256/shortcut --steps=1,4,128
"""

from ml_collections import ConfigDict

from configs import base

SHORTCUT = {"shortcut_b2": "B/2", "shortcut_xl2": "XL/2"}


def get_config(variant: str = "") -> ConfigDict:
    """DiT-B/2 on latents, or a variant.

    Raises:
      ValueError: another variant.
    """
    if variant not in ("", "pixels", *SHORTCUT):
        names = ", ".join(["pixels", *SHORTCUT])
        raise ValueError(
            f"configs/celebahq256.py has no variant {variant!r}: leave it out, or one of {names}"
        )
    config = base.get_config()
    config.dataset_name = "celebahq256"
    config.image_size = 256
    config.holdout = 0.0  # the published recipes train on the whole training set
    config.use_stable_vae = int(variant != "pixels")
    config.batch_size = 512
    config.max_steps = 500_000
    config.flip = True
    config.model.update({"size": "B/8" if variant == "pixels" else "B/2"})
    config.optimizer.update({"beta2": 0.99})
    config.eval_interval = 20_000
    config.save_interval = 10_000
    if variant in SHORTCUT:
        config.objective = "shortcut"
        config.batch_size = 64
        config.max_steps = 410_000
        config.model.update({"size": SHORTCUT[variant]})
        config.optimizer.update({"beta2": 0.999, "weight_decay": 0.1})
        config.ema.update({"decay": 0.999})
        config.sample.update({"steps": (1, 4, 128)})
    return config
