"""Flow matching and MeanFlow pictures as a pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(DIR, trust_remote_code=True)
    images = pipe(class_labels=[3, 7], num_inference_steps=1).images

From noise at t = 1 to data at t = 0 a step is z_r = z_t − (t − r) u(z_t, r, t): with an average
velocity u that is MeanFlow (arXiv 2505.13447), with the velocity at r = t it is Euler's method.
"""

# mypy: ignore-errors

import difflib
import json
import operator
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

SAMPLERS = ("meanflow", "euler", "heun")
OUTPUTS = ("pil", "np", "pt", "latent")
Generators = torch.Generator | list[torch.Generator] | None


class FlowPipeline(DiffusionPipeline):
    """Makes pictures from noise by a velocity network.

    Args:
      transformer: the `FlowTransformer2DModel` beside this file.
      vae: `AutoencoderKL` or `AutoencoderTiny` for a network on latents; None: on pixels, or the
        latents are for another decoder.
      objective: what it was trained for: flow_matching, mean_flow or another that teaches average
        velocities.
      latents: whether the network sees latents of an autoencoder.
      id2label: {"0": name of the class 0, …}, if the classes have names.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(
        self,
        transformer,
        vae=None,
        objective: str = "flow_matching",
        latents: bool = False,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(objective=objective, latents=latents, id2label=id2label)
        self.labels = {name: int(number) for number, name in (id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        num_samples: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: Tensor | None = None,
        sampler: str | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Returns pictures.

        Args:
          class_labels: numbers, or names where the classes have them; one for all, or one for each,
            as a list, an array or a tensor. The number of classes stands for no label. None: drawn
            by the generator.
          num_inference_steps: default 1 for average velocities, 32 for flow matching.
          guidance_scale: of classifier-free guidance, which doubles the network's work unless it is
            an input of the network; 1: none.
          generator: of the noise, then of the labels; a list has one for all, or one for each.
          num_samples: how many pictures; default one for each label, or for each of `latents`.
          height, width: of the pictures; the model makes one size.
          latents: the noise to start from, (n, channels, height, width) as the network sees it.
          sampler: meanflow, euler or heun (two calls a step); default what it was trained for.
          timesteps: the times themselves, falling from 1 to 0, in place of even ones.
          guidance_interval: the times at which there is guidance.
          output_type: pil; np, float32 (n, height, width, channels) in [0, 1]; pt, the same with
            the channels second; latent, what the network ends at, undecoded.
          return_dict: False for a tuple in place of `ImagePipelineOutput`.
        Raises:
          ValueError: what this model cannot do.
        """
        sampler = self._check(sampler, guidance_scale, output_type, height, width)
        asked = _listed(class_labels)
        count = self._count(asked, num_samples, latents, generator)
        device = self._execution_device
        z = self._noise(count, generator, latents, device)
        labels = self._labels(asked, count, generator, device)
        times = self._times(num_inference_steps, timesteps)
        if sampler == "meanflow" and self.config.objective == "consistency" and len(times) > 2:
            raise ValueError("consistency training teaches one step: num_inference_steps=1")
        velocity = self._guided(labels, guidance_scale, guidance_interval)
        with self.progress_bar(total=len(times) - 1) as bar:
            for t, r in pairwise(times):
                z = STEPS[sampler](velocity, z, t, r)
                bar.update()
        images = z if output_type == "latent" else self._pictures(z, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """The numbers of classes by their names."""
        return [self._number(name) for name in ([label] if isinstance(label, str) else label)]

    # What is asked for

    def _check(self, sampler, guidance_scale, output_type, height, width) -> str:
        """Raises ValueError where the model cannot serve; returns the sampler."""
        average = self.config.objective != "flow_matching"
        sampler = sampler or ("meanflow" if average else "euler")
        if sampler not in SAMPLERS:
            raise ValueError(f"no sampler {sampler!r}: one of {', '.join(SAMPLERS)}")
        if sampler == "meanflow" and not average:
            raise ValueError("sampler meanflow needs a network of MeanFlow: use euler or heun")
        self._check_guidance(guidance_scale)
        if output_type not in OUTPUTS:
            raise ValueError(f"no output_type {output_type!r}: one of {', '.join(OUTPUTS)}")
        if output_type != "latent" and self.config.latents and self.vae is None:
            raise ValueError(
                "this pipeline has no autoencoder: ask for output_type='latent' and decode those, "
                "or pass vae=... to from_pretrained"
            )
        factor = 1
        if self.vae is not None:
            c = self.vae.config
            widths = c.get("block_out_channels") or c.get("decoder_block_out_channels")
            factor = 2 ** (len(widths) - 1)
        size = [factor * side for side in self.transformer.config.sample_size]
        for name, given, own in (("height", height, size[0]), ("width", width, size[1])):
            if given not in (None, own):
                raise ValueError(f"{name}={given}: this model makes {size[0]}×{size[1]}")
        return sampler

    def _check_guidance(self, guidance_scale) -> None:
        """Raises ValueError where the model cannot be guided so."""
        if guidance_scale != 1 and not self.transformer.config.num_classes:
            raise ValueError(f"guidance_scale={guidance_scale}: the network knows no labels, use 1")
        if not abs(guidance_scale) < 1e6:
            raise ValueError(f"guidance_scale={guidance_scale}: a finite number, 1 for none")
        if guidance_scale < 1 and self.transformer.config.get("guidance_inputs"):
            raise ValueError(f"guidance_scale={guidance_scale}: the network was told 1 and above")

    def _count(self, asked: list | None, num_samples: int | None, latents, generator) -> int:
        """How many pictures; one label serves any number, and so does one generator."""
        counts = {"num_samples": num_samples, "latents": None if latents is None else len(latents)}
        if asked is not None and len(asked) != 1:
            counts["class_labels"] = len(asked)
        given = {name: count for name, count in counts.items() if count is not None}
        if len(set(given.values())) > 1 or min(given.values(), default=1) < 1:
            told = ", ".join(f"{name} says {count}" for name, count in given.items())
            raise ValueError(f"how many pictures? {told}")
        count = next(iter(given.values()), 1)
        if isinstance(generator, list) and len(generator) not in (1, count):
            raise ValueError(f"{len(generator)} generators for {count} pictures: one, or one each")
        return count

    def _noise(self, count: int, generator: Generators, latents, device) -> Tensor:
        """What is started from, float32 on the device."""
        c = self.transformer.config
        shape = (count, c.in_channels, *c.sample_size)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise ValueError(f"latents of {tuple(latents.shape)}: the network sees {shape}")
        return latents.to(device, torch.float32)

    def _labels(
        self, asked: list | None, count: int, generator: Generators, device
    ) -> Tensor | None:
        """The labels (count,), drawn where none are given; None for a network without."""
        classes = self.transformer.config.num_classes
        if not classes:
            if asked is not None:
                raise ValueError("class_labels were given, and the network knows none")
            return None
        if asked is None:
            own = generator if isinstance(generator, list) else [generator]
            each = count // len(own)
            drawn = [
                torch.randint(classes, (each,), generator=g, device=g.device if g else "cpu")
                for g in own
            ]
            return torch.cat([part.to(device) for part in drawn])
        numbers = [self._number(label) for label in asked]
        return torch.tensor(numbers, device=device).expand(count)

    def _number(self, label) -> int:
        """The number of a class, from it or from its name."""
        classes = self.transformer.config.num_classes
        if isinstance(label, str):
            plain = {_plain(name): number for name, number in self.labels.items()}
            if label not in self.labels and _plain(label) not in plain:
                near = difflib.get_close_matches(_plain(label), plain, n=1)
                known = f"did you mean {near[0]!r}?" if near else ", ".join(list(plain)[:20])
                raise ValueError(f"no class {label!r}: {known or 'they have no names here'}")
            return self.labels.get(label, plain.get(_plain(label)))
        try:
            number = operator.index(label)
        except TypeError:
            raise ValueError(f"class {label}: a whole number, or a name") from None
        if not 0 <= number <= classes:
            raise ValueError(f"class {label}: from 0 to {classes - 1}, or {classes} for none")
        return number

    def _times(self, steps: int | None, timesteps: Sequence[float] | None) -> list[float]:
        """From 1 to 0."""
        if timesteps is not None:
            times = [_single(t) for t in timesteps]
            falling = all(a > b for a, b in pairwise(times))
            if not (falling and len(times) > 1 and times[0] == 1 and times[-1] == 0):
                raise ValueError(f"timesteps={times}: times that fall from 1 to 0")
            return times
        if steps is None:
            steps = 32 if self.config.objective == "flow_matching" else 1
        if not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"num_inference_steps={steps}: a whole number, at least 1")
        return (1 - np.linspace(0, 1, steps + 1)).astype(np.float32).tolist()

    # How it is made

    def _guided(self, labels: Tensor | None, scale: float, interval: tuple[float, float]):
        """The velocity u(∅) + scale · (u(c) − u(∅)), at times within the interval; else u(c).

        A network that is told scale and interval gives that by itself.
        """
        if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
            raise ValueError(f"guidance_interval={interval}: two times in [0, 1], the lower first")
        low, high = (_single(time) for time in interval)
        told = self.transformer.config.get("guidance_inputs")

        def velocity(z: Tensor, r: float, t: float) -> Tensor:
            given = labels
            guided = scale != 1 and low <= t <= high and not told
            if guided:
                null = torch.full_like(labels, self.transformer.config.num_classes)
                z, given = torch.cat([z, z]), torch.cat([labels, null])
            start, end = (torch.full((len(z),), time, device=z.device) for time in (r, t))
            numbers = {}
            if told:
                numbers["guidance"] = torch.tensor([[scale, low, high]], device=z.device)
                numbers["guidance"] = numbers["guidance"].expand(len(z), 3)
            u = self.transformer(z, end, start, given, **numbers).sample
            if not guided:
                return u
            conditional, unconditional = u.chunk(2)
            return unconditional + scale * (conditional - unconditional)

        return velocity

    def _pictures(self, z: Tensor, output_type: str):
        """Decoded, in the form that is asked for."""
        if self.vae is not None:
            z = self._decoded(z)
        images = (z.float() / 2 + 0.5).clamp(0, 1)
        if output_type == "pt":
            return images
        images = images.cpu().permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    def _decoded(self, z: Tensor) -> Tensor:
        """Latents as the network sees them → pictures about [−1, 1].

        They are (raw − shift) · factor, with the numbers of the autoencoder's config.
        """
        c = self.vae.config
        if self.vae.dtype == torch.float16 and c.get("force_upcast"):
            self.vae.to(dtype=torch.float32)

        def number(key: str, default):
            value = c.get(key)
            value = torch.tensor(default if value is None else value, device=z.device)
            return value.float().reshape(1, -1, 1, 1)

        shift = number("latents_mean", c.get("shift_factor") or 0.0)
        factor = number("scaling_factor", 1.0) / number("latents_std", 1.0)
        return self.vae.decode((z / factor + shift).to(self.vae.dtype)).sample

    # How it is kept

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """As every pipeline's, and with the code, so that the folder loads by itself."""
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = pathlib.Path(save_directory)
        index = json.loads((folder / self.config_name).read_text())
        index.pop("_name_or_path", None)  # a place on this machine
        index["_class_name"] = [_copied(type(self), folder), type(self).__name__]
        network = type(self.transformer)
        index["transformer"] = [_copied(network, folder / "transformer"), network.__name__]
        (folder / self.config_name).write_text(json.dumps(index, indent=2) + "\n")


def _single(time: float) -> float:
    """A time as float32 has it: so are those of the steps, and an interval's end may be one."""
    return float(np.float32(float(time)))


def _listed(labels) -> list | None:
    """What may be one label or several, NumPy's and PyTorch's among them, as a list; None: none."""
    if isinstance(labels, Tensor | np.ndarray | np.generic):
        labels = labels.tolist()  # a single one where there is no axis
    several = isinstance(labels, Sequence) and not isinstance(labels, str)
    return None if labels is None else list(labels) if several else [labels]


def _plain(name: str) -> str:
    """A name without regard to case, and to spaces written as _ or -."""
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def _copied(kind: type, folder: pathlib.Path) -> str:
    """Copies the file that defines a class; returns its name without .py."""
    file = pathlib.Path(sys.modules[kind.__module__].__file__ or "")
    shutil.copyfile(file, folder / file.name)
    return file.stem


# (velocity, z, t, r) → z at r.
Velocity = Callable[[Tensor, float, float], Tensor]


def meanflow(velocity: Velocity, z: Tensor, t: float, r: float) -> Tensor:
    """Along the average velocity."""
    return z - (t - r) * velocity(z, r, t)


def euler(velocity: Velocity, z: Tensor, t: float, r: float) -> Tensor:
    """Along the velocity at t."""
    return z - (t - r) * velocity(z, t, t)


def heun(velocity: Velocity, z: Tensor, t: float, r: float) -> Tensor:
    """Along the mean of the velocities at both ends (the explicit trapezoidal rule)."""
    start = velocity(z, t, t)
    end = velocity(z - (t - r) * start, r, r)
    return z - (t - r) * (start + end) / 2


STEPS = {"meanflow": meanflow, "euler": euler, "heun": heun}
