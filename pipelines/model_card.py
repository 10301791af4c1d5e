"""Model cards: the README.md of an exported folder, as Hugging Face's hub reads it.

The front matter is YAML with the hub's keys (license, library_name, pipeline_tag, tags); below it
stand what the model is, what it was trained on and how, what was measured and by which protocol,
and commands that can be pasted.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from etils import epath
from ml_collections import ConfigDict

from models.dit import SIZES
from utils.cli import UserError
from utils.optimizers import MOMENTUM

Library = Literal["jax", "diffusers"]

PAPERS = {
    "flow_matching": "flow matching ([arXiv 2210.02747](https://arxiv.org/abs/2210.02747))",
    "mean_flow": "MeanFlow ([arXiv 2505.13447](https://arxiv.org/abs/2505.13447))",
    "improved_mean_flow": "improved MeanFlow ([arXiv 2512.02012](https://arxiv.org/abs/2512.02012))",
    "alpha_flow": "α-Flow ([arXiv 2510.20771](https://arxiv.org/abs/2510.20771))",
    "shortcut": "a shortcut model ([arXiv 2410.12557](https://arxiv.org/abs/2410.12557))",
    "consistency": "consistency training ([arXiv 2303.01469](https://arxiv.org/abs/2303.01469))",
}
# What the hub's `license` may be, of those that weights commonly have; others are `other`.
LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "agpl-3.0", "unlicense"),
    *("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail"),
    *("openrail++", "creativeml-openrail-m"),
)
# Of a number that was measured: the fields of an evaluation's row that are kept in the card.
KEPT = (
    *(
        "run",
        "metric",
        "value",
        "deviation",
        "deviation_of",
        "steps",
        "nfe",
        "sampler",
        "sampling_guidance",
    ),
    *("grid", "guidance_interval", "ema", "num_samples", "labels", "seed", "protocol", "reference"),
)
_Check = Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e40  # which NaN is not


def _is_word(value: Any) -> bool:
    return isinstance(value, str)


# What a card's keys hold, of those that are stated here; none is a must.
HELD: dict[str, _Check] = {
    **dict.fromkeys(("licence", "origin", "ema", "dataset", "autoencoder"), _is_word),
    **dict.fromkeys(("parameters", "train_steps", "train_images", "train_flops"), _is_number),
    "trained_guidance": _is_number,
    "class_names": lambda names: isinstance(names, list) and all(map(_is_word, names)),
    "initialised_from": lambda card: (
        isinstance(card, dict) and _is_number(card.get("train_steps", 0))
    ),
    "measured": lambda rows: isinstance(rows, list) and all(map(_is_row, rows)),
}
# What a row of `measured` holds; what is not named may be anything.
ROW: dict[str, _Check] = {
    **dict.fromkeys(("protocol", "reference", "deviation_of"), _is_word),
    **dict.fromkeys(("deviation", "sampling_guidance", "num_samples"), _is_number),
    "value": lambda value: _is_number(value) or value != value,  # of a run that diverged
}


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and all(
        row.get(key) is None or holds(row[key]) for key, holds in ROW.items()
    )


def check(card: dict[str, Any]) -> None:
    """Raises UserError where a card, which may be a stranger's, holds what `text` cannot state."""
    for key, holds in HELD.items():
        if card.get(key) and not holds(card[key]):
            raise UserError(f"card.json is none of this project: its {key} cannot be")


QUICK = re.compile(r"(?P<metric>\w+)_quick_(?P<count>\d+)/(?P<steps>\d+)_steps?")


def text(
    config: ConfigDict, card: dict[str, Any], *, library: Library = "jax", name: str = ""
) -> str:
    """Returns README.md of a folder that holds a trained network.

    Args:
      config: the run's config; keys that are younger than it may be missing.
      card: as `pipelines.flow.FlowPipeline` has it. `licence` is stated as it is, `measured` (of
        `measured_in_training` and `measured_by`) are the metrics, `origin` where imported weights
        are from; all may be missing.
      library: what opens the folder: this project, or PyTorch's diffusers.
      name: the folder as commands are to call it; a whole path is cut to its last part.
    Raises:
      UserError: the card holds something else.
    """
    check(card)
    name = name.rstrip("/")
    name = os.path.basename(name) if os.path.isabs(name) or "://" in name else name
    sections = (
        _front(config, card, library),
        f"# {os.path.basename(name) or _data(config, card)}\n\n{_what(config, card)}",
        f"## Use\n\n{_use(config, card, library, name or '.')}",
        f"## Training data\n\n{_training_data(config, card)}",
        f"## Recipe\n\n{_recipe(config, card, library)}",
        f"## Metrics\n\n{_metrics(card.get('measured') or [])}",
        f"## Licence\n\n{_licence(card)}",
    )
    return "\n\n".join(section.strip("\n") for section in sections) + "\n"


def measured_in_training(workdir: str | os.PathLike, step: int) -> list[dict[str, Any]]:
    """The numbers of a run's last evaluation at or before `step`; empty where there are none."""
    found: dict[str, dict[str, Any]] = {}
    path = epath.Path(workdir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:  # cut short, by a full disk
            continue
        if not isinstance(values, dict) or not isinstance(at := values.get("step"), int):
            continue
        for key, value in values.items() if at <= step else ():
            told = _of_training(key, at)
            if told and isinstance(value, int | float):
                found[key] = {**told, "value": value}
    return list(found.values())


def _of_training(key: str, step: int) -> dict[str, Any] | None:
    """What a scalar of `metrics.jsonl` is, where it says how good the samples are."""
    if key == "self_consistency":
        return {
            "metric": key,
            "protocol": f"on the held-out split at training step {step:,}: how far u is from being "
            "an average velocity; 0 for a perfect one",
        }
    match = QUICK.fullmatch(key)
    return match and {
        "metric": match["metric"],
        "steps": int(match["steps"]),
        "num_samples": int(match["count"]),
        "protocol": f"quick distance drawn in training at step {step:,}: says where a run goes, "
        "and is no result",
    }


def measured_by(
    results: str | os.PathLike, workdir: str | os.PathLike, config: ConfigDict, card: dict[str, Any]
) -> list[dict[str, Any]]:
    """The rows of eval_fid.py's results.json that are of this network, and of real data beside it.

    Args:
      workdir: the run's folder; rows are known by its name, its objective, its training step and,
        where the card says it, the average's decay.
    Raises:
      UserError: no such file, another kind of file, or none of its rows is of this network.
    """
    try:
        rows = json.loads(pathlib.Path(results).read_bytes())["rows"]
        rows = [{key: row.get(key) for key in (*KEPT, "objective", "train_steps")} for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--results={results} is no results.json of eval_fid.py ({type(error).__name__}): name "
            "the one in the --out folder of an evaluation"
        ) from error
    folder = f"/{os.path.abspath(os.path.expanduser(workdir))}"
    mine = [
        row
        for row in rows
        if row["objective"] == config.objective
        and row["train_steps"] == card.get("train_steps")
        and folder.endswith(f"/{row['run']}")
        and row["ema"] in (None, card.get("ema", row["ema"]))
    ]
    if not mine:
        there = sorted({f"{r['run']} at step {r['train_steps']}" for r in rows if r["train_steps"]})
        raise UserError(
            f"--results={results} holds no row of {os.path.basename(folder)} at step "
            f"{card.get('train_steps')}{_of_average(card)}, only of "
            f"{', '.join(there) or 'real data'}: evaluate it with eval_fid.py, or give "
            "--checkpoint or --ema"
        )
    kinds = {(row["metric"], row["protocol"]) for row in mine}
    real = [r for r in rows if r["steps"] is None and (r["metric"], r["protocol"]) in kinds]
    kept = mine + [row for row in real if row not in mine]
    return [{key: row[key] for key in KEPT if row[key] is not None} for row in kept]


def _of_average(card: dict[str, Any]) -> str:
    return f" and EMA {card['ema']}" if card.get("ema") else ""


# Sections


def _front(config: ConfigDict, card: dict[str, Any], library: Library) -> str:
    """The front matter; its values are JSON, which YAML contains."""
    licence = (card.get("licence") or "").strip()
    known = licence.lower() in LICENCES
    values: dict[str, Any] = {
        "license": licence.lower() if known else "other" if licence else "unknown",
        **({"license_name": licence} if licence and not known else {}),
        "library_name": library,
    }
    pictures = len(card["shape"]) == 3
    if pictures:
        values["pipeline_tag"] = "unconditional-image-generation"
    names = {"mean_flow": "meanflow", "improved_mean_flow": "improved-meanflow"}
    kind = names.get(config.objective, config.objective.replace("_", "-"))
    tags = [kind, "image-generation" if pictures else None, "jax" if library == "jax" else None]
    tags += ["class-conditional" if card["num_classes"] else None]
    values["tags"] = [tag for tag in tags if tag]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---"])


def _what(config: ConfigDict, card: dict[str, Any]) -> str:
    """What the network makes of what."""
    shape = "×".join(map(str, card["shape"]))
    seen = f"latents of {shape}" if config.use_stable_vae else f"pictures of {shape}"
    seen = seen if len(card["shape"]) == 3 else "points in the plane"
    labels = f"{card['num_classes']} classes" if card["num_classes"] else "no labels"
    paper = PAPERS.get(config.objective, config.objective)
    size = f", {card['parameters']:,} parameters" if card.get("parameters") else ""
    lines = [f"A {_network(config)}{size}, that makes {seen} by {paper}; {labels}."]
    if config.objective != "flow_matching":
        own = ", by its own sampler" if config.objective == "consistency" else ""
        lines.append(f"One network call makes a sample; more steps refine it{own}.")
    if card.get("origin"):
        lines.append(f"Its weights were imported from {card['origin']}.")
    names = card.get("class_names") or ()
    if 0 < len(names) <= 20 and list(names) != [str(i) for i in range(len(names))]:
        lines.append(f"The classes, from 0: {', '.join(names)}.")
    return "\n".join(lines)


def _network(config: ConfigDict) -> str:
    m = config.model
    if m.name == "unet":
        times = ", ".join(map(str, m.channel_multipliers))
        return (
            f"U-Net (base width {m.hidden_size}, multipliers {times}, blocks per resolution "
            f"{m.depth})"
        )
    if m.name != "dit":
        return f"{m.name.upper()} of depth {m.depth} and width {m.hidden_size}"
    keys = ("depth", "hidden_size", "num_heads", "patch_size")
    of = SIZES.get(m.size, {}) | {key: m[key] for key in keys if m.get(key) is not None}
    size = f"-{m.size}" if m.size else ""
    patches = f"patches of {of.get('patch_size')}"
    own = [words for key, value, words in OPTIONS if m.get(key) == value]
    blocks = m.get("velocity_head", 0)
    own += [f"a second head of {blocks} block{'s' * (blocks > 1)}"] * bool(blocks)
    return (
        f"DiT{size} (depth {of.get('depth')}, width {of.get('hidden_size')}, {of.get('num_heads')} "
        f"heads, {', '.join([patches, *own])})"
    )


OPTIONS = (  # of a DiT, what is not the default
    *(("positions", "rope", "RoPE"), ("mlp", "swiglu", "SwiGLU"), ("norm", "rms", "RMS norm")),
    *(("qk_norm", True, "qk-norm"), ("conditioning", "tokens", "in-context tokens")),
)


def _use(config: ConfigDict, card: dict[str, Any], library: Library, name: str) -> str:
    steps = 32 if config.objective == "flow_matching" else 1
    told = config.model.get("guidance_inputs") and card["num_classes"]
    most = config.get("improved_mean_flow", {}).get("omega_max", 1)
    scale = f"{min(2.0, most) if most > 1 else 2.0}"
    if library == "jax":
        label = " --labels=-1" if card["num_classes"] else ""
        labels = f"np.full(16, {card['num_classes']})" if not card["num_classes"] else None
        flag, given = (f" --guidance={scale}", f", guidance={scale}") if told else ("", "")
        labels = labels or f"np.arange(16) % {card['num_classes']}"
        return (
            f"```\npython sample.py --workdir={name}{label} --steps={steps} --num=16{flag}\n```\n\n"
            "```python\nimport numpy as np\n\nfrom pipelines.flow import FlowPipeline\n\n"
            f'pipe = FlowPipeline.from_pretrained("{name}")\n'
            f"samples = pipe({labels}, steps={steps}, seed=0{given})\n```"
        )
    given = "class_labels=[0] * 4" if card["num_classes"] else "num_samples=4"
    given += f", guidance_scale={scale}" if told else ""
    output = ', output_type="latent"' if card.get("without_decoder") else ""
    return (
        "```python\nimport torch\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{name}", trust_remote_code=True)\n'
        "generator = torch.Generator().manual_seed(0)\n"
        f"images = pipe({given}, num_inference_steps={steps}, generator=generator{output}).images\n"
        "```\n\nThe code that `trust_remote_code` runs is in the folder: two files of Python, of "
        "the pipeline and of the network."
    )


def _data(config: ConfigDict, card: dict[str, Any]) -> str:
    """The data set's name, without its fingerprint."""
    return (card.get("dataset") or config.dataset_name).split(" ")[0]


def _training_data(config: ConfigDict, card: dict[str, Any]) -> str:
    if card.get("origin") and not card.get("dataset"):
        return f"What its weights saw, {card['origin']} says."
    told = card.get("dataset") or config.dataset_name
    name, _, fingerprint = told.rpartition(" ") if " " in told else (told, "", "")
    lines = [f"`{name}`" + (f" (fingerprint {fingerprint})" if fingerprint else "") + "."]
    if config.use_stable_vae:
        made = f" (fingerprint {card['autoencoder']})" if card.get("autoencoder") else ""
        lines.append(f"The network sees the latents of an autoencoder{made}, kept beside it.")
    if config.get("flip"):
        lines.append("Pictures were flipped at random, left to right.")
    return " ".join(lines)


def _recipe(config: ConfigDict, card: dict[str, Any], library: Library) -> str:
    """A table: one line per choice that a paper's appendix would name."""
    if card.get("origin") and not card.get("train_steps"):
        return f"It was trained elsewhere: {card['origin']} says how."
    o = config.optimizer
    end = f", to 0 over the last {o.decay_steps:,}" if o.schedule == "wsd" else ""
    rate = f"{o.lr:g}, {o.schedule}{end}" + (
        f", {o.warmup_steps:,} steps of warm-up" if o.warmup_steps else ""
    )
    prediction = config.model.get("prediction", "velocity")
    started = card.get("initialised_from") or {}
    rows: list[tuple[str, Any]] = [
        ("objective", config.objective.replace("_", " ")),
        ("times", _times(config)),
        ("prediction", "" if prediction == "velocity" else prediction),
        ("batch", config.batch_size),
        ("optimizer", _optimizer(o)),
        ("learning rate", rate),
        ("gradient clipping", f"{o.clip_norm:g}" if o.clip_norm else ""),
        ("EMA", f"{card.get('ema') or config.ema.decay}"),
        ("label dropout", config.model.class_dropout_prob if card["num_classes"] else ""),
        ("dropout", config.model.dropout or ""),
        ("computed in", config.model.dtype),
        ("steps", _count(card, "train_steps")),
        ("images", _count(card, "train_images")),
        ("training FLOPs", f"{card['train_flops']:.3g}" if card.get("train_flops") else ""),
        ("guidance trained in", _guidance(config, card)),
        ("started from", started and f"a network of {started.get('train_steps', 0):,} steps"),
        ("seed", config.seed),
    ]
    body = "\n".join(f"| {key} | {value} |" for key, value in rows if value not in ("", None, {}))
    where = "config.json" if library == "jax" else "training/config.json"
    return f"| | |\n|---|---|\n{body}\n\n`{where}` holds every key of it."


def _optimizer(o: ConfigDict) -> str:
    name, moments = o.get("name", "adamw"), o.get("moments", "float32")
    words = f"AdamW, β₁ {o.beta1:g}, β₂ {o.beta2:g}"
    words = f"Muon (β {MOMENTUM:g}; other parameters {words})" if name == "muon" else words
    moments = "8 bits" if name == "adamw8bit" else moments
    words += f", moments in {moments}" if moments != "float32" else ""
    return words + (f", weight decay {o.weight_decay:g}" if o.weight_decay else "")


def _count(card: dict[str, Any], key: str) -> str:
    return "" if card.get(key) is None else f"{int(card[key]):,}"


def _times(config: ConfigDict) -> str:
    section = config.get(config.objective)
    if section is None:
        return ""
    if config.objective == "shortcut":
        return f"steps of 1 to 2^-{section.levels}"
    law = section.time_law.replace("_", "-")
    if section.time_law != "uniform":
        law += f"({section.time_mean:g}, {section.time_std:g})"
    if "transition" in section:
        law += f", α from 1 to 0 in steps {section.transition[0]:,} to {section.transition[1]:,}"
    if config.objective != "flow_matching":
        law += f", r ≠ t for {100 * section.interval_share:g} % of the batch"
    return law


def _guidance(config: ConfigDict, card: dict[str, Any]) -> str:
    scale = card.get("trained_guidance")
    if config.model.guidance_inputs:
        most = config.improved_mean_flow.omega_max
        return f"an input of the network, from 1 to {most:g}: one call, whatever the scale"
    if scale in (None, 1) or config.objective not in ("mean_flow", "alpha_flow"):
        return "none"
    m = config[config.objective]
    low, high = m.guidance_interval
    return f"ω′ = {scale:g} (ω = {m.omega:g}, κ = {m.kappa:g}) for t in [{low:g}, {high:g}]"


def _metrics(measured: Sequence[dict[str, Any]]) -> str:
    """A table per protocol and reference."""
    if not measured:
        return "None were measured."
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in measured:
        groups.setdefault((row.get("protocol", ""), row.get("reference", "")), []).append(row)
    return "\n\n".join(_table(*key, rows) for key, rows in groups.items())


COLUMNS: dict[str, Callable[[Any], str]] = {
    "run": str,
    "metric": str,
    "value": lambda v: f"{v:.4g}",
    "deviation": lambda v: f"± {v:.2g}",
    "steps": str,
    "nfe": str,
    "sampler": str,
    "grid": str,
    "sampling_guidance": lambda v: f"{v:g}",
    "guidance_interval": str,
    "num_samples": lambda v: f"{v:,}",
    "ema": str,
    "seed": str,
}
SETTINGS = ("sampler", "grid", "sampling_guidance", "guidance_interval", "ema", "seed")


def _table(protocol: str, reference: str, rows: Sequence[dict[str, Any]]) -> str:
    """Its numbers; what is the same for all of the network's is said once, below."""
    told = {c: {_cell(c, row) for row in rows if row.get("steps")} - {""} for c in COLUMNS}
    same = [c for c in SETTINGS if len(told[c]) == 1]
    columns = [c for c in COLUMNS if c not in same and any(_cell(c, row) for row in rows)]
    lines = [[_cell(c, row) for c in columns] for row in rows]
    heads = [c.replace("_", " ") for c in columns]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))
    stated = [f"All samples: {', '.join(f'{_words(c)} {min(told[c])}' for c in same)}."] * any(same)
    spreads = sorted({row["deviation_of"] for row in rows if row.get("deviation_of")})
    stated += [f"± is one standard deviation over: {', '.join(spreads)}."] * any(spreads)
    stated += [f"Protocol: {protocol}."] + [f"Reference: {reference}."] * bool(reference)
    return f"{table}\n\n{' '.join(stated)}"


def _cell(column: str, row: dict[str, Any]) -> str:
    return "" if row.get(column) is None else COLUMNS[column](row[column])


def _words(column: str) -> str:
    return {"ema": "EMA", "guidance_interval": "guided at t"}.get(column, column.replace("_", " "))


def _licence(card: dict[str, Any]) -> str:
    licence = (card.get("licence") or "").strip()
    return (
        f"`{licence}`" if licence else "Not stated: ask those who trained it before you share it."
    )
