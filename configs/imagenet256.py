"""ImageNet at 256×256, as latents of the Stable Diffusion VAE.

  python prepare_data.py --source=imagenet2012 --autoencoder=stabilityai/sd-vae-ft-mse --flip \
      --out=data/imagenet256    # or --source=FOLDER --dataset_name=imagenet256, a tree of classes
  python train_flow.py --config=configs/imagenet256.py --data_dir=data/imagenet256
  python train_meanflow.py --config=configs/imagenet256.py:meanflow_b4 --data_dir=data/imagenet256
  python eval_fid.py --workdir=runs/imagenet256/flow_matching \
      --workdir=runs/imagenet256/mean_flow --steps=1,2,4,32 --out=runs/imagenet256

Without a variant, flow matching B/2 as jax-flow trained it (FID-50K 15.5 at guidance 4 and 500
steps, 42.0 without guidance, in its README); it mirrors pictures, hence --flip above.

Variants of MeanFlow (arXiv 2505.13447, tables 1 to 3; 1-step FID-50K there): meanflow_b4_ablation
(no guidance, 80 epochs, 61.06), meanflow_b4_guided (ω′ = 3, 80 epochs, 15.53), meanflow_b4 (11.35
in the authors' code), meanflow_b2 (6.17), meanflow_m2 (5.01), meanflow_l2 (3.84), meanflow_xl2
(3.43, 2 steps 2.93), meanflow_xl2plus (2 steps 2.20). They need no --flip.

Variants of improved MeanFlow (arXiv 2512.02012; 1-step FID-50K there): improved_b2 (3.39),
improved_m2 (2.27), improved_l2 (1.86), improved_xl2 (1.72, 2 steps 1.54). Guidance is an input of
these networks: their authors sample B at scale 8 for t in [0.4, 0.65], M and L at 10.5 in
[0.4, 0.6], XL at 8 in [0.42, 0.62], and XL's two steps at 4 in [0.36, 0.64].

  python train_meanflow.py --config=configs/imagenet256.py:improved_b2 --data_dir=data/imagenet256
  python eval_fid.py --workdir=runs/imagenet256/improved_mean_flow --steps=1 --guidance=8 \
      --guidance_interval=0.4:0.65

Variants of α-Flow (arXiv 2510.20771; FID-50K of 1 and 2 steps there): alpha_b2 (5.40, 5.01),
alpha_xl2 (2.95, 2.34). MeanFlow's settings, guidance included, with α falling over the first two
thirds of training: how the authors' falls is not known to us, so these are no reproductions.

`pixels` trains B/8 on pixels and needs no autoencoder: --data_dir names a folder, a .zip, a folder
that TFDS prepared, or what prepare_data.py --autoencoder=none wrote, which is quicker to read.

  python prepare_data.py --source=imagenet2012 --autoencoder=none --out=data/imagenet256_pixels
  python train_flow.py --config=configs/imagenet256.py:pixels --data_dir=data/imagenet256_pixels

The latents of all 1,281,167 pictures are 21 GB, 42 GB with --flip: --cache=device keeps them in the
devices' memory, --cache=host in the host's.
"""

from ml_collections import ConfigDict

from configs import base

STEPS_PER_EPOCH = 1_281_167 // 256

# size, epochs, ω, κ, times t at which the target is guided
MEANFLOW = {
    "meanflow_b4_ablation": ("B/4", 80, 1.0, 0.0, (0.0, 1.0)),
    "meanflow_b4_guided": ("B/4", 80, 3.0, 0.0, (0.0, 1.0)),
    "meanflow_b4": ("B/4", 240, 1.0, 0.5, (0.0, 1.0)),
    "meanflow_b2": ("B/2", 240, 1.0, 0.5, (0.0, 1.0)),
    "meanflow_m2": ("M/2", 240, 1.0, 0.5, (0.0, 1.0)),
    "meanflow_l2": ("L/2", 240, 0.2, 0.92, (0.0, 0.8)),
    "meanflow_xl2": ("XL/2", 240, 0.2, 0.92, (0.0, 0.75)),
    "meanflow_xl2plus": ("XL/2", 1000, 1.0, 0.5, (0.3, 0.8)),
}

# depth, width, heads
IMPROVED = {
    "improved_b2": (12, 768, 12),
    "improved_m2": (24, 768, 12),
    "improved_l2": (32, 1024, 16),
    "improved_xl2": (48, 1024, 16),
}
ALPHA = {"alpha_b2": "meanflow_b2", "alpha_xl2": "meanflow_xl2"}


def get_config(variant: str = "") -> ConfigDict:
    """Flow matching B/2 as jax-flow trained it, or a variant.

    Raises:
      ValueError: another variant.
    """
    config = base.get_config()
    config.dataset_name = "imagenet256"
    config.image_size = 256
    config.holdout = 0.0  # the published recipes train on the whole training set
    config.use_stable_vae = 1
    config.batch_size = 512
    config.max_steps = 1_000_000
    config.flip = True
    config.model.update({"size": "B/2"})
    config.optimizer.update({"beta2": 0.99})
    config.eval_interval = 20_000
    config.save_interval = 10_000
    if variant in MEANFLOW:
        return meanflow(config, *MEANFLOW[variant])
    if variant in IMPROVED:
        return improved(config, *IMPROVED[variant])
    if variant in ALPHA:
        return alpha(meanflow(config, *MEANFLOW[ALPHA[variant]]))
    if variant == "pixels":
        config.use_stable_vae = 0
        config.model.update({"size": "B/8"})
    elif variant:
        names = ", ".join(["pixels", *MEANFLOW, *IMPROVED, *ALPHA])
        raise ValueError(f"configs/imagenet256.py has no variant {variant!r}: one of {names}")
    return config


def meanflow(
    config: ConfigDict,
    size: str,
    epochs: int,
    omega: float,
    kappa: float,
    interval: tuple[float, float],
) -> ConfigDict:
    """MeanFlow's published settings: batch 256, Adam(0.9, 0.95), lr 1e-4 constant, no flips."""
    config.batch_size = 256
    config.max_steps = epochs * STEPS_PER_EPOCH
    config.flip = False
    config.model.update({"size": size})
    config.optimizer.update({"beta2": 0.95})
    config.mean_flow.update({"omega": omega, "kappa": kappa, "guidance_interval": interval})
    return config


def improved(config: ConfigDict, depth: int, width: int, heads: int) -> ConfigDict:
    """Improved MeanFlow's published settings: batch 1024, 640 epochs, of which 10 of warm-up.

    Their network is told t − r alone, and guidance up to a scale of 8.
    """
    steps_per_epoch = STEPS_PER_EPOCH // 4
    config.objective = "improved_mean_flow"
    config.batch_size = 1024
    config.max_steps = 640 * steps_per_epoch
    config.flip = False
    config.optimizer.update({"beta2": 0.95, "warmup_steps": 10 * steps_per_epoch})
    config.model.update({"size": "", "depth": depth, "hidden_size": width, "num_heads": heads})
    inner = 8 * width // 3  # rounded down, as in the authors' code
    config.model.update({"patch_size": 2, "mlp_ratio": inner / width, "time_inputs": "t-r"})
    config.model.update({"positions": "rope", "mlp": "swiglu", "norm": "rms", "qk_norm": True})
    config.model.update({"conditioning": "tokens", "velocity_head": 8, "guidance_inputs": True})
    config.improved_mean_flow.update({"omega_max": 8.0})
    return config


def alpha(config: ConfigDict) -> ConfigDict:
    """α-Flow in MeanFlow's place, with the guidance that MeanFlow has."""
    config.objective = "alpha_flow"
    guidance = {key: config.mean_flow[key] for key in ("omega", "kappa", "guidance_interval")}
    transition = (0, 2 * config.max_steps // 3)
    config.alpha_flow.update({**guidance, "transition": transition})
    config.mean_flow.update({"omega": 1.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)})
    return config
