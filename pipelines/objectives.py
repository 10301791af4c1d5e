"""From a config to the objective that it names, bound to its options."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import base
from flows import times
from flows.bootstrap import alpha_flow, consistency, shortcut
from flows.guidance import effective_scale, power_law
from flows.objectives import flow_matching, improved_mean_flow, mean_flow
from pipelines.build import Network, told
from utils.cli import UserError


def flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.objectives.flow_matching` with the config's options bound.

    Args:
      local: as `mean_flow_objective` takes it; all the same here.
    Raises:
      UserError: options out of range.
    """
    if told(config.model) == ["t-r"]:
        raise UserError("flow matching needs model.time_inputs with t or r: t-r alone is always 0")
    check_heads(config, "flow_matching")
    return partial(
        flow_matching,
        time_law=time_law(config.flow_matching, "flow_matching"),
        **_label_dropout(config, num_classes),
    )


def mean_flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.objectives.mean_flow` with the config's options bound.

    Args:
      local: samples that a device has in a microbatch. Where they are whole periods of the pattern
        that says which have r ≠ t, du/dt is computed for those alone; 0: for all, which is slower
        and gives the same numbers.
    Raises:
      UserError: options out of range.
    """
    m, name = config.mean_flow, "mean_flow"
    check_heads(config, name)
    check_average(config, name)
    return partial(
        mean_flow,
        time_law=time_law(m, name),
        interval_share=m.interval_share,
        p=m.p,
        c=m.c,
        **_guidance(config, name, num_classes),
        tangent=tuple(m.tangent),
        apart=m.derivative == "apart" and splits_evenly(name, m.interval_share, local),
        forward=None,
        dropout=config.model.dropout > 0,
        **_label_dropout(config, num_classes),
    )


def improved_mean_flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.objectives.improved_mean_flow`; arguments and errors as of `mean_flow_objective`."""
    m, name = config.improved_mean_flow, "improved_mean_flow"
    check_average(config, name)
    guided = m.omega_max > 1
    if guided != config.model.guidance_inputs:
        most = m.omega_max if guided else 8
        raise UserError(
            f"improved_mean_flow.omega_max={m.omega_max:g} with "
            f"model.guidance_inputs={config.model.guidance_inputs}: a network is told the guidance "
            f"that it is taught; give --improved_mean_flow.omega_max={most:g} "
            "--model.guidance_inputs, or neither"
        )
    if guided:
        check_guidable(config, "improved_mean_flow.omega_max=1", num_classes)
    return partial(
        improved_mean_flow,
        time_law=time_law(m, name),
        interval_share=m.interval_share,
        p=m.p,
        c=m.c,
        guidance_law=power_law(m.omega_max, m.omega_power) if guided else None,
        heads=None,
        forward=None,
        apart=splits_evenly(name, m.interval_share, local),
        **_label_dropout(config, num_classes),
    )


def alpha_flow_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.bootstrap.alpha_flow`; arguments and errors as of `mean_flow_objective`."""
    name = "alpha_flow"
    pair_law = times.interval(time_law(config.alpha_flow, name))
    guidance = _guidance(config, name, num_classes)
    return _annealed(alpha_flow, config, num_classes, local, pair_law=pair_law, **guidance)


def consistency_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.bootstrap.consistency`; arguments and errors as of `mean_flow_objective`."""
    pair_law = times.to_data(time_law(config.consistency, "consistency"))
    none = {"omega": 1.0, "kappa": 0.0, "guidance_interval": (0.0, 1.0)}
    return _annealed(consistency, config, num_classes, local, pair_law=pair_law, **none)


def _annealed(
    objective: Callable, config: ConfigDict, num_classes: int, local: int, **bound: Any
) -> Callable:
    """α-Flow, or consistency training, with what their sections share."""
    name = objective.__name__
    m = config[name]
    check_heads(config, name)
    check_average(config, name)
    start, end = m.transition = tuple(m.transition) if any(m.transition) else two_thirds(config)
    if start == end:
        raise UserError(f"{name}.transition={start},{end}: give --{name}.transition=0,{end}")
    if end > config.max_steps and jax.process_index() == 0:
        print(
            f"warning: α falls until step {end:,}, after training ends at {config.max_steps:,}: "
            f"--{name}.transition=0,{two_thirds(config)[1]} ends in time",
            file=sys.stderr,
        )
    return partial(
        objective,
        interval_share=m.interval_share,
        alpha=times.annealed(start, end, m.sharpness, m.clamp),
        p=m.p,
        c=m.c,
        forward=None,
        apart=splits_evenly(name, m.interval_share, local),
        **_label_dropout(config, num_classes),
        **bound,
    )


def two_thirds(config: ConfigDict) -> tuple[int, int]:
    """The transition where none is given, as the run's config then says it."""
    return 0, max(2 * config.max_steps // 3, 1)


def shortcut_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """`flows.bootstrap.shortcut`; arguments and errors as of `mean_flow_objective`."""
    m = config.shortcut
    check_heads(config, "shortcut")
    check_average(config, "shortcut")
    return partial(
        shortcut,
        levels=m.levels,
        interval_share=m.interval_share,
        clip=m.clip,
        apart=splits_evenly("shortcut", m.interval_share, local),
        **_label_dropout(config, num_classes),
    )


AVERAGES: dict[str, Callable] = {  # what teaches average velocities; the first is the default
    "mean_flow": mean_flow_objective,
    "improved_mean_flow": improved_mean_flow_objective,
    "alpha_flow": alpha_flow_objective,
    "shortcut": shortcut_objective,
    "consistency": consistency_objective,
}


def average_objective(config: ConfigDict, num_classes: int, local: int = 0) -> Callable:
    """The objective of `AVERAGES` that `config.objective` names; "": MeanFlow.

    Raises:
      UserError: there is none of that name, or options out of range.
    """
    name = config.objective or "mean_flow"
    if name not in AVERAGES:
        flow = "; train_flow.py has flow_matching" if name == "flow_matching" else ""
        raise UserError(f"objective={name!r}: give --objective={' or '.join(AVERAGES)}{flow}")
    warn_of_others(config, name)
    return AVERAGES[name](config, num_classes, local)


def warn_of_others(config: ConfigDict, name: str) -> None:
    """Says, once, where MeanFlow's options are given to an objective that has its own."""
    given, own = config.mean_flow, config[name]
    known = base.objectives()
    lost = [
        key
        for key in own
        if key in given and given[key] != known["mean_flow"][key] and own[key] == known[name][key]
    ]
    if lost and name != "mean_flow" and jax.process_index() == 0:
        words = " ".join(f"--{name}.{key}" for key in lost)
        print(
            f"warning: mean_flow.{lost[0]}={given[lost[0]]} is MeanFlow's: {name} has its own, "
            f"{words}",
            file=sys.stderr,
        )


def check_average(config: ConfigDict, name: str) -> None:
    """Raises UserError where a network cannot say what an average velocity is."""
    if told(config.model) in (["t"], ["r"]):
        raise UserError(f"{name} needs model.time_inputs of two times, t,t-r, or t-r alone")
    if config.model.prediction == "noise":
        raise UserError(f"{name} needs --model.prediction=velocity: noise says nothing of r < t")


def check_heads(config: ConfigDict, name: str) -> None:
    """Raises UserError where a network has inputs or outputs that an objective does not teach."""
    for key in ("velocity_head", "guidance_inputs"):
        if config.model[key]:
            raise UserError(
                f"model.{key} is for --objective=improved_mean_flow, {name} does not teach it: "
                "leave it out"
            )


def check_guidable(config: ConfigDict, none: str, num_classes: int) -> None:
    """Raises UserError where there is nothing to guide by; `none` is how to ask for no guidance."""
    if config.model.class_dropout_prob == 0:
        raise UserError("guidance needs a trained null label: --model.class_dropout_prob=0.1")
    if num_classes == 0 or config.model.class_dropout_prob == 1:
        raise UserError(f"guidance needs labels: --{none}")


def _guidance(config: ConfigDict, name: str, num_classes: int) -> dict:
    m = config[name]
    if m.omega != 1 or m.kappa != 0:
        check_guidable(config, f"{name}.omega=1 --{name}.kappa=0", num_classes)
    interval = tuple(m.guidance_interval)
    return {"omega": m.omega, "kappa": m.kappa, "guidance_interval": interval}


def with_forward(objective: Callable, network: Network) -> Callable:
    """The objective with the network that it differentiates in forward mode, and its second head.

    MeanFlow's plain form differentiates one pass in both modes; all else is forward mode alone.
    """
    given = objective.keywords  # type: ignore[attr-defined]
    if "heads" in given:
        objective = partial(objective, heads=network.heads)
    if "forward" not in given:
        return objective
    both_modes = objective.func is mean_flow and not given["apart"]  # type: ignore[attr-defined]
    return partial(objective, forward=network.plain if both_modes else network.forward)


def splits_evenly(name: str, share: float, local: int) -> bool:
    """Whether `local` samples hold whole periods of the pattern of r ≠ t; if not, warns once."""
    period = len(times.interval_pattern(share))
    if local % period and jax.process_index() == 0:
        print(
            f"warning: {local} samples per device and microbatch are no multiple of {period}, so "
            f"{name}.interval_share={share:g} does not split evenly: targets are computed for all "
            "samples, the same numbers at more work; a larger --batch_size avoids it",
            file=sys.stderr,
        )
    return local > 0 and local % period == 0


def time_law(section: ConfigDict, name: str) -> times.TimeLaw:
    """The law of t that a section of the config names."""
    laws = {
        "uniform": times.uniform(),
        "logit_normal": times.logit_normal(section.time_mean, section.time_std),
    }
    if section.time_law not in laws:
        raise UserError(f"{name}.time_law={section.time_law!r}: logit_normal or uniform")
    law, (low, high) = laws[section.time_law], section.time_range
    return law if (low, high) == (0, 1) else times.clipped(law, low, high)


def trained_guidance(config: ConfigDict) -> float:
    """ω′: the guidance scale that training put into the network; 1 for none."""
    if config.objective not in ("mean_flow", "alpha_flow"):
        return 1.0
    section = config[config.objective]
    return effective_scale(section.omega, section.kappa)


def _label_dropout(config: ConfigDict, num_classes: int) -> dict:
    probability = config.model.class_dropout_prob if num_classes else 0.0
    return {"class_dropout_prob": probability, "null_label": num_classes}
