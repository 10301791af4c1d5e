"""Every key of a run and its default; the other files here change a few of them.

Names follow jax-flow where it has the key. On the command line `--config.KEY=VALUE`, or
`--KEY VALUE` for short, changes a key; what is given there wins over every preset.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Returns the defaults: a DiT trained with AdamW on the embedded digits."""
    return ConfigDict(
        {
            # Data. `data_dir` is needed where the data set is not embedded.
            "dataset_name": "digits",
            "data_dir": "",
            "image_size": 0,  # pixels; 0: as the data set has it
            "flip": False,  # random horizontal flip
            "holdout": 0.1,  # share kept from training, where the data set has no split of its own
            "use_stable_vae": 0,  # 1: latents that prepare_data.py wrote to data_dir; 0: pixels
            "autoencoder": "",  # folder or hub name of what made them; "": the copy beside them
            "autoencoder_dtype": "float32",  # or bfloat16: decodes faster
            "autoencoder_slice": 32,  # pictures that a device decodes at once; 0: all
            "cache": "disk",  # where the data is kept: disk, host or device memory
            # Training.
            "seed": 0,
            "batch_size": 256,  # over all devices and hosts, accumulation included
            "accumulation": 1,  # microbatches per step
            "max_steps": 100_000,
            "log_interval": 100,  # steps
            "eval_interval": 10_000,  # steps; sample grids and self-consistency
            **_keeping(),
            "deterministic": False,  # bit for bit on GPUs too, slower; on CPU and TPU always
            # What is learnt, a section below: train_flow.py has flow_matching, train_meanflow.py
            # mean_flow, improved_mean_flow, alpha_flow, shortcut and consistency. "": the first.
            "objective": "",
            # A run or an exported model to begin with its parameters; more time inputs than it has
            # start without an effect, so that at r = t the network is the same.
            "init_from": "",
            "model": _model(),
            **objectives(),
            "optimizer": _optimizer(),
            "ema": _averages(),
            "mesh": {"data": -1, "fsdp": 1},  # devices per axis; -1: all the rest
            # Pictures drawn during training.
            "sample": {"steps": (1, 32), "num": 64, "guidance": 1.0},
            # A quick distance at every evaluation; num samples, 0: none. A few thousand say where a
            # run goes, and are no result: eval_fid.py gives those.
            "fid": {
                "num": 0,
                "steps": (1,),
                "features": "inception",  # mobilenet, dinov2 or classifier
                "weights": "",
                "reference": "",  # pictures or statistics; "": the training split
            },
            "wandb": {"mode": "disabled", "project": "flow", "name": ""},  # offline, online
            "tensorboard": False,
        }
    )


def _keeping() -> dict:
    """What is saved, and when a run is not well."""
    return {
        "save_interval": 5_000,  # steps
        "save_patience": 6.0,  # hours without a save that succeeds, until the run fails
        "keep_checkpoints": 2,  # the newest
        "keep_best": 1,  # beside them, those with the lowest best_metric
        # Of an evaluation: fid_quick_2000/1_step say; "": none. self_consistency of MeanFlow
        # serves ill: it rises from 0, where nothing is learnt yet, before it falls.
        "best_metric": "",
        # Updates that are not finite are left out; after `skip_limit` in a row the run stops.
        "skip_limit": 10,
        "stall": 120.0,  # seconds without data or progress until a line says so
    }


def _optimizer() -> dict:
    """How parameters are updated."""
    return {
        "name": "adamw",  # adamw, adamw8bit (moments in 8 bits) or muon
        "lr": 1e-4,
        "beta1": 0.9,  # muon: of AdamW's part alone, what is no hidden matrix; Muon's own is 0.95
        "beta2": 0.95,
        "weight_decay": 0.0,
        "moments": "float32",  # or bfloat16, of AdamW's and Muon's
        "warmup_steps": 0,
        # constant; cosine, to 0 at max_steps; or wsd: warm-up, stable, then to 0 in decay_steps.
        "schedule": "constant",
        "decay_steps": 0,
        "clip_norm": 0.0,  # global gradient norm; 0: no clipping
    }


def _averages() -> dict:
    """Averages of the parameters along training: what samples are drawn with."""
    return {
        "decay": 0.9999,
        "start_step": 0,  # until there exponential averages are copies; of posthoc ones none is
        "interval": 1,  # steps between updates; the decay is that of an update
        "also": (),  # further decays, to choose from by --ema
        # Post-hoc EMA: relative widths of power-function averages, as (0.05, 0.1); snapshots of
        # them, every so many steps, make the average of any width afterwards.
        "posthoc": (),
        "snapshot_interval": 0,
    }


def _model() -> dict:
    """What computes u(z, r, t)."""
    return {
        "name": "dit",  # dit, unet or mlp
        "size": "",  # "B/2" and the like; the keys below win where they are given
        "depth": placeholder(int),
        "hidden_size": placeholder(int),
        "patch_size": placeholder(int),
        "num_heads": placeholder(int),
        "mlp_ratio": 4.0,
        "dropout": 0.0,
        "class_dropout_prob": 0.1,  # label → null label, for guidance; 1: trains without labels
        "time_inputs": "t,t-r",  # what the network is told: "t", "t,r", "t,t-r" or "t-r"
        "time_scale": 1.0,  # of the times; above 1 MeanFlow diverges: for imported weights alone
        # velocity; data, x = z − t u, for pixels; or noise, of DiT's diffusion
        "prediction": "velocity",
        # Of a DiT: positions absolute or rope; mlp gelu or swiglu; norm layer or rms; conditioning
        # adaln (adaLN-Zero) or tokens (in context).
        "positions": "absolute",
        "mlp": "gelu",
        "norm": "layer",
        "qk_norm": False,
        "conditioning": "adaln",
        "velocity_head": 0,  # blocks of a second head that predicts v, for improved_mean_flow
        "guidance_inputs": False,  # whether it is told a guidance scale and interval, likewise
        # Of a U-Net, whose hidden_size is its base width and depth its blocks per resolution.
        "channel_multipliers": (1, 2, 2),
        "attention_resolutions": (),  # sides of the feature maps with self-attention
        "resample": "box",  # or fir, the filter of NCSN++
        "dtype": "float32",  # of the computation; parameters stay float32
        # Attention: xla, cudnn (GPU, bfloat16) or splash (TPU); and that of du/dt, in forward mode
        # alone: xla or fused. auto: the fastest known for the device.
        "attention": "auto",
        "attention_jvp": "auto",
        "remat": "none",  # what the backward pass computes again: none, dots or full (each block)
        "unroll": 1,  # blocks per turn of the scan over depth; on CPUs, all is faster
    }


def objectives() -> dict:
    """What it is trained on; each objective reads its own section."""
    return {
        "flow_matching": _times(0.0),
        "mean_flow": {
            **_times(-0.4),
            "interval_share": 0.25,  # share of the batch with r ≠ t
            "p": 1.0,  # adaptive weight 1 / (error + c)^p
            "c": 0.01,
            **_guided(),
            # Direction (dr, dt) of the derivative beside dz = v; others are the paper's ablation.
            "tangent": (0.0, 1.0),
            # apart: each part of the target for the samples that need it; plain: as the paper has
            # it, the same numbers at a third more work, to compare with.
            "derivative": "apart",
        },
        "improved_mean_flow": {
            **_times(-0.4),
            "interval_share": 0.5,
            "p": 1.0,
            "c": 0.01,
            # Guidance scales that the network is told lie in [1, omega_max], their density falls as
            # ω^-omega_power; 1: none. Needs model.guidance_inputs.
            "omega_max": 1.0,
            "omega_power": 1.0,
        },
        "alpha_flow": {
            **_times(-0.4),
            "interval_share": 0.25,
            "p": 1.0,
            "c": 0.001,  # to the mean error per element
            **_guided(),
            **_transition(),
        },
        "shortcut": {
            "levels": 7,  # the finest step is 2^-levels
            "interval_share": 0.125,
            "clip": 4.0,  # of what the targets are made of; 0: none
        },
        "consistency": {
            **_times(-0.4),
            "interval_share": 1.0,
            "p": 1.0,
            "c": 0.001,
            **_transition(),
        },
    }


def _times(mean: float) -> dict:
    """The law of the times t."""
    return {
        "time_law": "logit_normal",  # or uniform
        "time_mean": mean,
        "time_std": 1.0,
        "time_range": (0.0, 1.0),  # times are clipped to it
    }


def _guided() -> dict:
    """Guidance in the target; ω′ = ω / (1 − κ), 1: none."""
    return {"omega": 1.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)}  # times t of the latter


def _transition() -> dict:
    """How α falls from 1 to 0 between two steps: a sigmoid, clamped near its ends.

    (0, 0) is the first two thirds of max_steps.
    """
    return {"transition": (0, 0), "sharpness": 25.0, "clamp": 0.005}
