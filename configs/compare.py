"""Plans of comparisons: recipes trained at equal budgets, measured alike, in one table.

  python scripts/compare.py --config=configs/compare.py:digits
  python scripts/compare.py --config=configs/compare.py:mnist --data_dir=data/mnist.npz
  python scripts/compare.py --config=configs/compare.py:ablation --data_dir=data/mnist.npz

A plan's runs are ordinary ones, `python train_flow.py --config=configs/...` and the like, and
--dry_run prints them all. Every key is a flag: `--seeds=0,1`, `--names=mean_flow,shortcut`,
`--recipes.shortcut.options=--shortcut.levels=5`.
"""

from ml_collections import ConfigDict

from configs import base

SMALL = "configs/mnist.py:small"
# A network of 0.2 million parameters on 4×4 patches of 7×7 pixels, for CPU cores.
TINY = (
    "--model.depth=2 --model.unroll=2 --model.hidden_size=64 --model.patch_size=7 --batch_size=64 "
    "--eval_interval=1000000 --save_interval=2000 --log_interval=25 --sample.steps=1 "
    "--sample.num=10"
)
RECIPES = {
    "flow_matching": {"objective": "flow_matching", "options": ""},
    "mean_flow": {"objective": "mean_flow", "options": ""},
    # The network that all share: no second head, no guidance to be told.
    "improved_mean_flow": {"objective": "improved_mean_flow", "options": ""},
    # From flow matching to MeanFlow within the budget of every recipe.
    "alpha_flow": {
        "objective": "alpha_flow",
        "options": "--alpha_flow.transition={0%},{60%}",
    },
    "shortcut": {"objective": "shortcut", "options": ""},
}


def get_config(variant: str = "") -> ConfigDict:
    """The plan `variant`: digits, mnist, optimizers or ablation; without one, what runs begin from.

    Raises:
      ValueError: another variant.
    """
    plans = {
        "": base.get_config,
        "digits": _digits,
        "mnist": _mnist,
        "optimizers": _optimizers,
        "ablation": _ablation,
    }
    if variant not in plans:
        known = ", ".join(filter(None, plans))
        raise ValueError(f"configs/compare.py has no variant {variant!r}: one of {known}")
    return plans[variant]()


def plan(name: str, recipes: dict[str, dict[str, str]], **given) -> ConfigDict:
    """A plan with all its keys; `given` replaces the defaults."""
    return ConfigDict(
        {
            "name": name,
            "base": "configs/digits.py",
            "data_dir": "",  # as the training scripts take it
            # Of every run, then of each recipe: flags of the training scripts. {60%} stands for
            # that share of max_steps.
            "options": "",
            "recipes": recipes,
            "names": ",".join(recipes),  # those that are compared, in the table's order
            "seeds": (0,),
            # The budget: steps, and the FLOPs that those steps take the recipe `flops_of`; "": the
            # first one.
            "max_steps": 1000,
            "budgets": "steps,flops",
            "flops_of": "",
            "steps": (1, 2, 4, 8, 32),  # of sampling
            "evaluation": "",  # flags of eval_fid.py
            "logged": "",  # metrics of training whose last tenth is tabled, error say
            # Tables of their own, at the least sampling steps: recipes in order, a label each, and
            # the numbers that somebody published for them.
            "groups": {},
        }
        | given
    )


def _digits() -> ConfigDict:
    """Two minutes on CPU cores: to see what comes out, not to judge by."""
    return plan(
        "digits",
        RECIPES,
        options="--model.depth=2 --model.hidden_size=64 --model.unroll=2 --batch_size=64 "
        "--eval_interval=1000000 --ema.decay=0.98",
        max_steps=300,
        evaluation="--features=classifier --metrics=fid --num_samples=500 --bootstrap=0",
    )


def _mnist() -> ConfigDict:
    """Three seeds of each, on CPU cores."""
    return plan("mnist", RECIPES, **_on_mnist(seeds=(0, 1, 2), max_steps=1500))


def _on_mnist(**given) -> dict:
    common = {
        "base": SMALL,
        "options": TINY,
        "evaluation": "--features=classifier --metrics=fid --num_samples=2000 --bootstrap=0",
    }
    return common | given


def _optimizers() -> ConfigDict:
    """Adam against its moments in 8 bits, on a network wide enough for most leaves to be packed."""
    recipes = {
        "adamw": {"objective": "flow_matching", "options": "--model.hidden_size=96"},
        "adamw8bit": {
            "objective": "flow_matching",
            "options": "--model.hidden_size=96 --optimizer.name=adamw8bit",
        },
    }
    return plan(
        "optimizers",
        recipes,
        **_on_mnist(seeds=(0, 1, 2), max_steps=600, budgets="steps", logged="error"),
    )


# What MeanFlow's authors varied one by one (arXiv 2505.13447, table 1: FID-50K of one step,
# ImageNet 256, DiT-B/4, 80 epochs; from a transcription): title, {recipe: (label, options, FID)}.
DEFAULT = "mean_flow"
ABLATION: dict[str, tuple[str, dict[str, tuple[str, str, float]]]] = {
    "share": (
        "share of r ≠ t",
        {
            "share_0": ("0 %", "--mean_flow.interval_share=0", 328.9),
            DEFAULT: ("25 %", "", 61.06),
            "share_50": ("50 %", "--mean_flow.interval_share=0.5", 63.14),
            "share_100": ("100 %", "--mean_flow.interval_share=1", 67.32),
        },
    ),
    "tangent": (
        "tangent of (z, r, t)",
        {
            DEFAULT: ("(v, 0, 1)", "", 61.06),
            "tangent_v00": ("(v, 0, 0)", "--mean_flow.tangent=0.0,0.0", 268.0),
            "tangent_v10": ("(v, 1, 0)", "--mean_flow.tangent=1.0,0.0", 329.0),
            "tangent_v11": ("(v, 1, 1)", "--mean_flow.tangent=1.0,1.0", 138.0),
        },
    ),
    "embedding": (
        "the network is told",
        {
            "told_t_r": ("t, r", "--model.time_inputs=t,r", 61.75),
            DEFAULT: ("t, t − r", "", 61.06),
            "told_all": ("t, r, t − r", "--model.time_inputs=t,r,t-r", 63.98),
            "told_gap": ("t − r", "--model.time_inputs=t-r", 63.13),
        },
    ),
    "times": (
        "law of the times",
        {
            "times_uniform": ("uniform", "--mean_flow.time_law=uniform", 65.90),
            "times_02": ("LN(−0.2, 1)", "--mean_flow.time_mean=-0.2", 63.83),
            DEFAULT: ("LN(−0.4, 1)", "", 61.06),
        },
    ),
    "weight": (
        "p of the weight",
        {
            "p_0": ("0", "--mean_flow.p=0", 79.75),
            "p_05": ("0.5", "--mean_flow.p=0.5", 63.98),
            DEFAULT: ("1", "", 61.06),
            "p_15": ("1.5", "--mean_flow.p=1.5", 66.57),
            "p_2": ("2", "--mean_flow.p=2", 69.19),
        },
    ),
    "omega": (
        "ω, κ = 0",
        {
            DEFAULT: ("1", "", 61.06),
            "omega_15": ("1.5", "--mean_flow.omega=1.5", 33.33),
            "omega_2": ("2", "--mean_flow.omega=2", 20.15),
            "omega_3": ("3", "--mean_flow.omega=3", 15.53),
            "omega_5": ("5", "--mean_flow.omega=5", 20.75),
        },
    ),
    "kappa": (
        "κ, ω′ = 2",
        {
            "omega_2": ("0", "--mean_flow.omega=2", 20.15),
            "kappa_05": ("0.5", "--mean_flow.omega=1 --mean_flow.kappa=0.5", 19.15),
            "kappa_08": ("0.8", "--mean_flow.omega=0.4 --mean_flow.kappa=0.8", 19.10),
            "kappa_09": ("0.9", "--mean_flow.omega=0.2 --mean_flow.kappa=0.9", 18.63),
            "kappa_095": ("0.95", "--mean_flow.omega=0.1 --mean_flow.kappa=0.95", 19.17),
        },
    ),
}


def _ablation() -> ConfigDict:
    """MeanFlow's ablations, whose order is compared with the published order.

    With the --workdir of `mnist` the runs of plain MeanFlow are shared.
    """
    recipes, groups = {}, {}
    for name, (title, members) in ABLATION.items():
        for recipe, (_, options, _) in members.items():
            recipes[recipe] = {"objective": "mean_flow", "options": options}
        labels, _, published = zip(*members.values(), strict=True)
        groups[name] = {
            "title": title,
            "recipes": tuple(members),
            "labels": labels,
            "published": published,
        }
    return plan(
        "ablation",
        recipes,
        **_on_mnist(max_steps=1500, budgets="steps", steps=(1, 2), groups=groups),
    )
