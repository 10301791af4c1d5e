"""FlowPipeline: a trained network and all it needs to make pictures.

A folder holds `config.json` (the run's config), `card.json` (what was trained, and how much) and
the averaged parameters: a run's `checkpoints/`, or `model.safetensors` where it was exported.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flows.guidance import calls_at, guided_velocity, network_calls
from flows.samplers import ADAPTIVE, GRIDS, SAMPLERS, dopri5, grid_of, integrate
from models.autoencoder import Autoencoder, points
from pipelines import build, model_card
from pipelines.pretrained import copy_autoencoder
from pipelines.stored import (
    WEIGHTS,
    check_described,
    check_exported,
    read_config,
    read_json,
    read_parameters,
    read_weights,
    saved_checkpoints,
    trained_card,
    write_json,
)
from utils import files
from utils.cli import UserError
from utils.sharding import batch_sharding, fetch, make_mesh, replicated
from utils.step import SAMPLING, stream

PATH = 1  # of a sample's key: what its way from noise to data draws
Grid = str | tuple[float, ...]  # a name of GRIDS, or the times


class Draw(NamedTuple):
    """Samples over the devices, padded to a multiple of their number; all may still be computed."""

    samples: Array  # (n, ...); of all times, (steps + 1, n, ...)
    finite: Array  # (n,) bool
    calls: Array  # (n,) int32: network calls (NFE), a guided one counts two


@dataclasses.dataclass(frozen=True, repr=False)
class FlowPipeline:
    """Samples from a trained velocity network.

    Attributes:
      config: the run's config; `config.objective` says how it was trained.
      card: shape, num_classes, parameters, flops_per_step, train_steps, train_images, train_flops,
        trained_guidance (ω′; 1: none), dataset, autoencoder (fingerprint), pictures (where those
        lie that the latents were made of).
      network: (init, apply, null_label), built from the two.
      sampler: `make_sampler` of it, compiled once per sampler and step count.
      params: the averaged parameters.
      loaded: an autoencoder that is there already; None: loaded when it is used.
    """

    config: ConfigDict
    card: dict[str, Any]
    network: build.Network
    sampler: Callable[..., Draw]
    params: Any
    loaded: Autoencoder | None = None
    _places: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def build(
        cls,
        config: ConfigDict,
        card: dict[str, Any],
        params: Any = None,
        autoencoder: Autoencoder | None = None,
    ) -> "FlowPipeline":
        """Builds the network that `config` and `card` describe, around `params`.

        Args:
          autoencoder: where it is loaded already; None: the one that config and card name, when it
            is used.
        """
        shape = tuple(card["shape"])
        network = build.network(config, shape, card["num_classes"])
        return cls(config, card, network, make_sampler(network, shape), params, autoencoder)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        autoencoder: str = "",
        *,
        step: int | None = None,
        ema: str = "",
    ) -> "FlowPipeline":
        """Loads a run's workdir, or a folder that `save_pretrained` wrote.

        Args:
          autoencoder: folder or hub name, for a run on latents; empty: the copy in `path`, or where
            the run had it from.
          step, ema: as `load` takes them.
        Raises:
          UserError: no such folder, no weights in it, or weights of another network.
        """
        return cls.describe(path, autoencoder).load(path, step=step, ema=ema)

    @classmethod
    def describe(cls, path: str | os.PathLike, autoencoder: str = "") -> "FlowPipeline":
        """What `from_pretrained` gives, without parameters: they are not read yet.

        Raises:
          UserError: no such folder, or one that holds no whole run.
        """
        folder = files.place(path)
        files.reach(folder)
        config, card = read_config(folder / "config.json"), read_json(folder / "card.json")
        if not {"shape", "num_classes"} <= card.keys() or not config.objective:
            raise UserError(f"{folder} holds no whole run: its config.json or card.json lacks keys")
        check_described(folder, config, card)
        copy = folder / build.AUTOENCODER
        config.autoencoder = autoencoder or (str(copy) if copy.is_dir() else config.autoencoder)
        files.check_local(autoencoder=config.autoencoder)
        for key in ("attention", "attention_jvp"):
            if config.model[key] != "xla":  # a kernel of the machine that trained it
                config.model[key] = "auto"
        return cls.build(config, card)

    def load(
        self, path: str | os.PathLike, *, step: int | None = None, ema: str = ""
    ) -> "FlowPipeline":
        """The same pipeline around the parameters in `path`; nothing is compiled again.

        Args:
          step: of the checkpoint; None: the newest.
          ema: of the averaged parameters a decay that the run kept, as "0.9999", or "power_0.05";
            "posthoc_0.1", or any width, where it saved snapshots; "none": the parameters
            themselves; empty: the run's own. A folder that `save_pretrained` wrote holds one step
            and one average.
        Raises:
          UserError: there is nothing of the kind, or it is of another network.
        """
        folder = files.place(path)
        abstract = jax.eval_shape(self.network.init, jax.random.key(0))
        if (folder / WEIGHTS).exists():
            check_exported(folder, self.card, step, ema)
            return dataclasses.replace(self, params=read_weights(folder / WEIGHTS, abstract))
        with saved_checkpoints(folder) as checkpoints:
            at = checkpoints.steps[-1] if step is None else step
            params = read_parameters(checkpoints, self.config, abstract, at, ema)
        card = self.card | trained_card(self.config, self.card, at)
        return dataclasses.replace(self, params=params, card=card)

    def save_pretrained(
        self, path: str | os.PathLike, dtype: str = "float32", readme: str = ""
    ) -> None:
        """Writes the folder that `from_pretrained` reads; float16 halves its size.

        A copy of the autoencoder goes with it, or its name where it is one on the hub.

        Args:
          readme: README.md; empty: `model_card.text` of config and card.
        Raises:
          UserError: the folder already holds a model, or a README.md.
        """
        folder = files.place(path)
        for name in (WEIGHTS, "config.json", "card.json", "README.md", "checkpoints"):
            if (folder / name).exists():
                raise UserError(f"{folder / name} exists: name another folder, or remove it")
        flat = flatten_dict(jax.device_get(self.params), sep=".")
        tensors = {k: np.ascontiguousarray(v, dtype) for k, v in flat.items()}
        place = build.autoencoder_place(self.config) if self.config.use_stable_vae else ""
        local = bool(place) and os.path.exists(place)
        config = {**self.config.to_dict(), "autoencoder": "" if local else place}
        write_json(folder / "config.json", config)
        write_json(folder / "card.json", self.card)
        if local:
            copy_autoencoder(place, folder / build.AUTOENCODER)
        card = readme or model_card.text(self.config, self.card, name=os.fspath(path))
        files.write(folder / "README.md", card)
        # The weights last and at once: with them it is whole.
        files.write(folder / WEIGHTS, safetensors.numpy.save(tensors))

    def __repr__(self) -> str:
        """A line: a network's numbers are many."""
        words = f"{self.config.objective}, {'x'.join(map(str, self.shape))}"
        return f"FlowPipeline({words}, {self.num_classes} classes, card={self.card})"

    @property
    def steps(self) -> int:
        """The steps of a sampler where none are given: 1 for average velocities, else 32."""
        return 1 if self.averages else 32

    @property
    def autoencoder(self) -> Autoencoder:
        """Latents ↔ pictures; its leaves are its parameters.

        Raises:
          UserError: it is not there, or another than that which made the latents.
        """
        if self.loaded is not None:
            return self.loaded
        return build.autoencoder(self.config, self.shape, self.card.get("autoencoder", ""))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.card["shape"])

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 for none."""
        return self.card["num_classes"]

    @property
    def averages(self) -> bool:
        """Whether the network was taught average velocities, over [r, t]."""
        return self.config.objective != "flow_matching"

    def __call__(self, labels: np.ndarray, **options: Any) -> np.ndarray:
        """Returns n pictures uint8 (n, height, width, channels), or points float32 (n, 2).

        Args and errors are those of `draw`; every process gets all samples.
        """
        samples, finite, _ = fetch(self.draw(labels, **options))
        n = len(labels)
        check_finite(finite[:n])
        return samples[:, :n] if options.get("keep") else samples[:n]

    def draw(
        self,
        labels: np.ndarray,
        *,
        steps: int | None = None,
        sampler: str = "",
        grid: Grid = "uniform",
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        indices: np.ndarray | None = None,
        noise: np.ndarray | None = None,
        tolerance: float = 1e-5,
        keep: bool = False,
        decode: bool = True,
    ) -> Draw:
        """Returns samples over the devices; what comes after len(labels) is to be left out.

        Args:
          labels: (n,) int32; num_classes for none.
          steps: steps of the sampler from t = 1 to t = 0; None: 1 for MeanFlow, 32 for flow
            matching; dopri5 takes as many as it needs.
          sampler: of SAMPLERS or dopri5; empty: meanflow for a network of average velocities, else
            euler.
          grid: where the steps lie, a name of GRIDS; or their times, from 1 falling to 0.
          guidance: scale of classifier-free guidance; 1 for none.
          guidance_interval: the times t at which it is used.
          indices: (n,) image numbers, default 0 … n − 1. The noise of a picture is a function of
            (seed, its number): neither batches nor devices change it.
          noise: float32 (n, *shape), instead of that.
          tolerance: of dopri5, relative and absolute.
          keep: return the way from noise to data, (steps + 1, n, ...), decoded at every time.
          decode: pictures; else what the network sees, float32 (n, *shape).
        Raises:
          UserError: steps below 1, an unknown sampler or one that the network cannot serve, times
            that do not fall from 1 to 0, noise of another shape, or guidance of a network without
            labels.
        """
        steps = self.steps if steps is None else steps
        sampler = self.check(steps, sampler, [guidance])
        times = self.times(steps, grid)
        check_adaptive(sampler, grid, tolerance, keep)
        self._check_labels(np.asarray(labels))
        n = len(labels)
        indices = np.arange(n) if indices is None else indices
        check_numbers(n, np.asarray(indices), guidance, guidance_interval, seed)
        self._check_told(guidance, guidance_interval)
        mesh = make_mesh()
        padding = -n % mesh.size
        label, index = (
            jax.device_put(np.pad(np.asarray(a, np.int32), (0, padding)), batch_sharding(mesh))
            for a in (labels, indices)
        )
        z, keys = noise_of(self.shape)(seed, index)
        if noise is not None:
            z = jax.device_put(_padded(noise, (n, *self.shape), padding), batch_sharding(mesh))
        params, codec = self._placed(mesh, decode)
        numbers = numbers_of(times, guidance, guidance_interval, tolerance)
        return self.sampler(params, codec, label, z, keys, numbers, sampler, guidance != 1, keep)

    def noise(self, seed: int, indices: np.ndarray) -> np.ndarray:
        """The noise (n, *shape) float32 of pictures by their numbers, as `draw` takes it."""
        z, _ = noise_of(self.shape)(seed, jnp.asarray(indices, jnp.int32))
        return np.asarray(z)

    def velocity(
        self,
        z: np.ndarray,
        r: np.ndarray | float,
        t: np.ndarray | float,
        labels: np.ndarray | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> np.ndarray:
        """The average velocity u(z, r, t) float32 (n, *shape) over [r, t]; at r = t the velocity.

        Args:
          z: (n, *shape), what the network sees at time t: 0 is data, 1 noise.
          r, t: numbers or (n,), 0 ≤ r ≤ t ≤ 1; r = t where flow matching trained the network.
          labels: (n,) int32; None: the null label.
          guidance, guidance_interval: what a network is told that takes them as an input.
        Raises:
          UserError: other shapes, times or scales that the network was not taught, or guidance of
            one that is not told it.
        """
        z, r, t = (np.asarray(a, np.float32) for a in (z, r, t))
        n, null = len(np.atleast_1d(z)), self.network.null_label
        label = np.full(n, null, np.int32) if labels is None else np.asarray(labels)
        self._check_inputs(z, r, t, label)
        check_numbers(n, np.arange(n), guidance, guidance_interval, seed=0)
        self._check_told(guidance, guidance_interval)
        if guidance != 1 and not self.network.told:
            raise UserError(
                f"guidance={guidance}: velocity gives u(·|label) of this network: guide by two "
                "calls, u(·|none) + guidance · (u(·|label) − u(·|none))"
            )
        r, t = (np.broadcast_to(time, n) for time in (r, t))
        told = np.broadcast_to(np.asarray([guidance, *guidance_interval], np.float32), (n, 3))
        inputs = z, r, t, label.astype(np.int32), *([told] * self.network.told)
        return np.asarray(_apply(self.network.apply)(self.params, *inputs))

    def _check_inputs(self, z: np.ndarray, r: np.ndarray, t: np.ndarray, label: np.ndarray) -> None:
        """Raises UserError where `velocity` cannot be asked for these."""
        n = len(np.atleast_1d(z))
        given = {"z": z, "r": r, "t": t, "labels": label}
        fitting: dict[str, tuple] = {"z": ((n, *self.shape),), "labels": ((n,),)}
        for name, array in given.items():
            shapes = fitting.get(name, ((), (n,)))
            if array.shape not in shapes:
                wanted = " or ".join(str(shape) for shape in shapes)
                raise UserError(f"{name} has shape {array.shape}: give {wanted}")
        self._check_labels(label)
        if not (np.all(r >= 0) and np.all(r <= t) and np.all(t <= 1)):
            raise UserError("times must be 0 <= r <= t <= 1: t = 0 is data, t = 1 noise")
        if self._to_data_alone and np.any(r > 0):
            raise UserError(
                "consistency training teaches averages down to the data alone: give r = 0"
            )
        if not self.averages and np.any(r < t):
            raise UserError(
                "flow matching teaches the velocity at r = t alone, and no average over r < t: "
                "give r = t"
            )

    def _check_labels(self, label: np.ndarray) -> None:
        """Raises UserError where labels are none of the network's."""
        null = self.network.null_label
        if label.ndim != 1 or not len(label) or not np.issubdtype(label.dtype, np.integer):
            raise UserError("labels: give whole numbers, one for each of one sample or more")
        if label.min() < 0 or label.max() > null:
            raise UserError(
                f"labels from {label.min()} to {label.max()}: give 0 to {null}, of which {null} is "
                "none"
            )

    def times(self, steps: int, grid: Grid = "uniform") -> np.ndarray:
        """The times of a grid, float32 (steps + 1,), from 1 to 0.

        Raises:
          UserError: an unknown name, or times that do not fall from 1 to 0.
        """
        if isinstance(grid, str):
            if grid not in GRIDS:
                raise UserError(f"no grid {grid!r}: there are {', '.join(GRIDS)}, or give times")
            return grid_of(steps, grid)
        times = np.asarray(grid, np.float32)
        falls = times.ndim == 1 and len(times) > 1 and np.all(np.diff(times) < 0)
        if not (falls and times[0] == 1 and times[-1] == 0):
            raise UserError(f"times {tuple(grid)}: they must fall from 1 to 0, as (1, 0.6, 0)")
        return times

    def _placed(self, mesh: Mesh, decode: bool = True) -> tuple[Any, Autoencoder]:
        """Parameters and autoencoder on every device, put there by the first batch for all."""
        if (mesh, decode) not in self._places:
            self._places.clear()
            codec = self.autoencoder if decode else points()
            self._places[mesh, decode] = jax.device_put((self.params, codec), replicated(mesh))
        return self._places[mesh, decode]

    def network_calls(
        self,
        steps: int,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str = "",
        grid: Grid = "uniform",
    ) -> int:
        """The number of function evaluations (NFE) per sample; of dopri5 `draw` counts them.

        Raises:
          UserError: as `draw`, and for dopri5.
        """
        sampler = self.check(steps, sampler, [guidance])
        if sampler == ADAPTIVE:
            raise UserError(f"{ADAPTIVE} calls the network as often as a sample needs: see draw")
        times = SAMPLERS[sampler].times(jnp.asarray(self.times(steps, grid)))
        scale = 1.0 if self.network.told else guidance
        return network_calls(np.asarray(times), scale, guidance_interval)

    def default_sampler(self, steps: int) -> str:
        """The sampler that goes with what the network was taught.

        Euler's where as many steps are asked of a shortcut model as its finest level has: their
        length it knows as none.
        """
        objective = self.config.objective
        if objective == "shortcut" and steps >= 2**self.config.shortcut.levels:
            return "euler"
        return {"flow_matching": "euler", "consistency": "consistency"}.get(objective, "meanflow")

    def with_params(self, params: Any) -> "FlowPipeline":
        """The same pipeline around other parameters; nothing is compiled again."""
        return dataclasses.replace(self, params=params)

    def check(self, steps: int, sampler: str, guidance: Iterable[float]) -> str:
        """The sampler's name, with the default filled in, where steps and scales are possible.

        Raises:
          UserError: as `draw`.
        """
        if not isinstance(steps, int | np.integer) or steps < 1:
            raise UserError(f"steps={steps}: a whole number, at least 1")
        sampler = sampler or self.default_sampler(int(steps))
        if sampler not in (*SAMPLERS, ADAPTIVE):
            raise UserError(f"no sampler {sampler!r}: there are {', '.join((*SAMPLERS, ADAPTIVE))}")
        if sampler in ("meanflow", "consistency") and not self.averages:
            raise UserError(
                f"sampler {sampler} needs average velocities, which flow matching does not teach: "
                "use euler, heun or euler_stochastic"
            )
        to_data = sampler == "consistency" or (sampler == "meanflow" and steps == 1)
        if self._to_data_alone and not to_data:
            raise UserError(
                f"sampler {sampler} needs velocities that consistency training does not teach: it "
                "knows the way to the data alone; use consistency"
            )
        for scale in guidance:
            if scale != 1 and self.num_classes == 0:
                raise UserError(f"guidance={scale}: this network knows no labels, use 1")
            self._check_told(scale)
        return sampler

    @property
    def _to_data_alone(self) -> bool:
        """Whether the network was taught u(z, 0, t) and nothing else."""
        config = self.config
        return config.objective == "consistency" and config.consistency.interval_share == 1

    def _check_told(self, scale: float, interval: tuple[float, float] = (0.0, 1.0)) -> None:
        """Raises UserError where a network that is told its guidance was never told such a one."""
        if not self.network.told or scale == 1:
            return
        if not interval[0] <= 0.5 <= interval[1]:
            raise UserError(
                f"guidance_interval={interval}: this network was told intervals around 0.5"
            )
        most = self.config.improved_mean_flow.omega_max
        most = most if most > 1 else np.inf  # of a network that came back from others it is unknown
        if not 1 <= scale <= most:
            scales = f"from 1 to {most:g}" if most < np.inf else "of 1 or more"
            raise UserError(
                f"guidance={scale}: this network was told scales {scales}: give --guidance {scales}"
            )


def consistent(config: ConfigDict) -> bool:
    """Whether an objective teaches average velocities over intervals anywhere, of any length."""
    return config.objective not in ("flow_matching", "consistency", "shortcut")


def make_sampler(network: build.Network, shape: tuple[int, ...]) -> Callable[..., Draw]:
    """Returns the jitted (params, autoencoder, label, noise, keys, numbers, sampler, guided, keep).

    numbers: the times of the grid, guidance, its interval's ends, and dopri5's tolerance; they
    compile nothing, the number of times does. The last three are static.
    """

    def run(params, autoencoder, label, noise, keys, numbers, sampler, guided, keep):
        times, scale, low, high, tolerance = numbers
        interval = (low, high)
        velocity = guided_velocity(
            network.apply, params, label, network.null_label, scale, interval, guided, network.told
        )
        guided = guided and not network.told  # told, it is one call
        if sampler == ADAPTIVE:
            each = jnp.full(len(noise), 2 if guided else 1)  # both, wherever the others stand
            x, calls = dopri5(velocity, noise, tolerance, lambda t: each)
        else:
            step, called = SAMPLERS[sampler]
            x = integrate(step, velocity, noise, times, keys, keep)
            calls = jnp.full(len(noise), calls_at(called(times), guided, interval).sum())
        finite = jnp.isfinite(x).all(axis=tuple(range(x.ndim - len(shape), x.ndim)))
        if keep:
            return Draw(jax.lax.map(autoencoder.decode, x), finite.all(0), calls)
        return Draw(autoencoder.decode(x), finite, calls)

    return jax.jit(run, static_argnums=(6, 7, 8))


def numbers_of(
    times: np.ndarray,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    tolerance: float = 1e-5,
) -> tuple:
    """The `numbers` of `make_sampler`."""
    return (times, *(np.float32(x) for x in (guidance, *interval, tolerance)))


@functools.cache
def noise_of(shape: tuple[int, ...]) -> Callable[[int, Array], tuple[Array, Array]]:
    """The jitted (seed, index (n,)) → noise (n, *shape), and a key (n,) for each sample's path."""

    def make(seed, index):
        keys = jax.vmap(lambda i: jax.random.fold_in(stream(seed, SAMPLING), i))(index)
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        return noise, jax.vmap(lambda key: jax.random.fold_in(key, PATH))(keys)

    return jax.jit(make)


@functools.lru_cache(maxsize=4)
def _apply(apply: Callable) -> Callable:
    return jax.jit(lambda params, *inputs: apply(params, *inputs[:4], None, *inputs[4:]))


def _padded(noise: np.ndarray, shape: tuple[int, ...], padding: int) -> np.ndarray:
    noise = np.asarray(noise, np.float32)
    if noise.shape != shape or not np.isfinite(noise).all():
        raise UserError(f"noise of shape {noise.shape}: give finite numbers, {shape}")
    return np.pad(noise, [(0, padding), *[(0, 0)] * (noise.ndim - 1)])


def check_numbers(
    n: int, indices: np.ndarray, guidance: float, interval: tuple[float, float], seed: int
) -> None:
    """Raises UserError where `FlowPipeline.draw` cannot be asked for these."""
    if indices.shape != (n,) or not np.issubdtype(indices.dtype, np.integer):
        raise UserError(f"indices {indices.shape} of {indices.dtype}: give {n} whole numbers")
    if not (np.isfinite(guidance) and abs(guidance) < 1e6):
        raise UserError(f"guidance={guidance}: a finite number, 1 for none")
    if not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
        raise UserError(f"guidance_interval={interval}: two times from 0 to 1, the lower first")
    if not 0 <= seed < 2**31:
        raise UserError(f"seed={seed}: from 0 to {2**31 - 1}")


def check_adaptive(sampler: str, grid: Grid, tolerance: float, keep: bool) -> None:
    """Raises UserError where dopri5 is asked for a grid, a path, or what floats cannot hold."""
    if sampler != ADAPTIVE:
        return
    if grid != "uniform" or keep:
        raise UserError(f"{ADAPTIVE} chooses its own times: leave the grid and the path out")
    if not 1e-7 <= tolerance <= 1:
        raise UserError(f"tolerance={tolerance}: from 1e-7, the least that float32 holds, to 1")


def check_finite(finite: np.ndarray) -> None:
    """Raises UserError where some samples, bool (n,), are not finite."""
    if not finite.all():
        raise UserError(
            f"{(~finite).sum()} of {len(finite)} samples are not finite: its training diverged, or "
            f"{ADAPTIVE} found no step small enough; take an earlier checkpoint or a greater "
            "tolerance, or compute in float32 (model.dtype in its config.json)"
        )
