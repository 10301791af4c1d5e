"""DiT with two times, for PyTorch: (z, t, r, label) → velocity (arXiv 2212.09748, 2505.13447).

t = 0 is data, t = 1 is noise, and r ≤ t. The output u(z, r, t) is the average velocity over [r, t];
at r = t it is the velocity of the flow. Weights may be of any float type: embeddings, norms, what
the blocks add to and the last layer are computed in float32; attention, MLP and the modulation's
layer in the type of the weights.
"""

# mypy: ignore-errors

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

FREQUENCIES = 256  # cosines, then sines, that a time is embedded as
EMBEDDERS = {"t": "t_embedder", "r": "r_embedder", "t-r": "d_embedder"}
# DiT's diffusion (linear β, 1000 steps): of each step τ the time t of the straight line from data
# to noise with the same signal-to-noise ratio, √((1 − ᾱ) / ᾱ) = t / (1 − t).
_RATIO = np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1)
STEP_TIMES = (_RATIO / (1 + _RATIO)).astype(np.float32)
LEAST = 0.05  # of t, by which predicted data are divided
GUIDANCE = ("omega", "t_min", "t_max")  # what may be told of the guidance
TOKENS = {"label": 8, "omega": 4, "t_min": 2, "t_max": 2}  # of an embedding; of a time 4


class FlowTransformer2DModel(ModelMixin, ConfigMixin):
    """A transformer on patches, told times and label by adaLN-Zero or by tokens.

    Args:
      sample_size: (height, width) of the input.
      in_channels: of input and output.
      patch_size: the side of a patch; it divides height and width.
      num_layers, hidden_size, num_attention_heads, mlp_ratio: of the blocks.
      num_classes: labels are 0 to num_classes − 1, and num_classes for none; 0: no labels.
      time_inputs: the times that the network is told, of t, r and t-r, by commas.
      time_scale: what the times are multiplied by before they are embedded.
      prediction: velocity; data, x = z − t u; or noise, which DiT's diffusion predicts. `forward`
        turns them into a velocity.
      positions: absolute, fixed sines on the patches; or rope, which turns queries and keys.
      mlp: gelu or swiglu. norm: layer or rms. qk_norm: whether queries and keys have an RMS norm.
      conditioning: adaln; or tokens before the patches.
      guidance_inputs: whether it is told by how much, and when, it is guided.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int] = (32, 32),
        in_channels: int = 4,
        patch_size: int = 2,
        num_layers: int = 12,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        time_inputs: str = "t,t-r",
        time_scale: float = 1.0,
        prediction: str = "velocity",
        positions: str = "absolute",
        mlp: str = "gelu",
        norm: str = "layer",
        qk_norm: bool = False,
        conditioning: str = "adaln",
        guidance_inputs: bool = False,
    ):
        super().__init__()
        told = [f"time_{name}" for name in time_inputs.split(",")]
        for name in told:
            self.add_module(EMBEDDERS[name.removeprefix("time_")], TimeEmbedder(hidden_size))
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
            told.append("label")
        if guidance_inputs:
            told.extend(GUIDANCE)
            for name in GUIDANCE:
                self.add_module(f"{name}_embedder", TimeEmbedder(hidden_size))
        if conditioning == "tokens":
            shapes = {name: (TOKENS.get(name, 4), hidden_size) for name in told}
            self.tokens = nn.ParameterDict({k: torch.zeros(shape) for k, shape in shapes.items()})
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        mlp_size, kind = round(mlp_ratio * hidden_size), (norm, conditioning)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, mlp_size, mlp, qk_norm, *kind)
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, *kind)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        start_timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        guidance: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Returns u(z, r, t), float32 of the shape of z.

        Args:
          hidden_states: z, (n, channels, height, width).
          timestep: t, (n,) in [0, 1].
          start_timestep: r, (n,), at most t; None: t, for the velocity of the flow.
          class_labels: (n,) whole numbers; None: without a label.
          guidance: (n, 3), the scale and the first and last t at which there is guidance, for a
            network with guidance_inputs; None: without guidance.
        """
        z, t = hidden_states.float(), timestep.float()
        r = t if start_timestep is None else start_timestep.float()
        if self.config.prediction == "noise":
            u = self._velocity_from_noise(z, t, class_labels, guidance)
        else:
            u = self._network(z, r, t, class_labels, guidance)
        if self.config.prediction == "data":
            u = (z - u) / t.clamp(min=LEAST).reshape(-1, 1, 1, 1)
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)

    def _network(
        self, z: Tensor, r: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """What the transformer puts out, float32 (n, channels, height, width)."""
        patch = self.config.patch_size
        n, channels, height, width = z.shape
        grid = height // patch, width // patch
        told = self._told(r, t, labels, guidance)
        x, c = self.x_embedder(z).float(), None
        if self.config.positions == "absolute":
            x = x + positions(*grid, self.config.hidden_size, z.device)
        if self.config.conditioning == "tokens":
            tokens = [self.tokens[name].float() + told[name][:, None] for name in _ordered(told)]
            x = torch.cat([*tokens, x], dim=1)
        else:
            c = F.silu(sum(told.values()))
        before = x.shape[1] - grid[0] * grid[1]
        places = grid_places(*grid, before) if self.config.positions == "rope" else None
        for block in self.blocks:
            x = block(x, c, places)
        x = self.final_layer(x[:, before:], c).reshape(n, *grid, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, channels, height, width)

    def _told(
        self, r: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor | None
    ) -> dict[str, Tensor]:
        """The embeddings of times, label and guidance, float32 (n, hidden_size) each."""
        times = {"t": t, "r": r, "t-r": t - r}
        scale, told = self.config.time_scale, {}
        for name in self.config.time_inputs.split(","):
            told[f"time_{name}"] = getattr(self, EMBEDDERS[name])(scale * times[name])
        if self.config.num_classes:
            if labels is None:
                labels = torch.full_like(t, self.config.num_classes, dtype=torch.long)
            told["label"] = self.y_embedder(labels)
        if self.config.guidance_inputs:
            if guidance is None:
                guidance = torch.tensor([[1.0, 0.0, 1.0]], device=t.device).expand(len(t), 3)
            omega, low, high = guidance.float().T
            for name, value in zip(GUIDANCE, (1 - 1 / omega, low, high), strict=True):
                told[name] = getattr(self, f"{name}_embedder")(value)
        return told

    def _velocity_from_noise(
        self, z: Tensor, t: Tensor, labels: Tensor | None, guidance: Tensor | None
    ) -> Tensor:
        """v = (ε(z / n, τ) − z) / (1 − t), n² = (1 − t)² + t², with τ of t's signal-to-noise ratio.

        Above the last step's time, where 1 − t divides by nothing, z is taken to lie there.
        """
        table = torch.as_tensor(STEP_TIMES, device=t.device)
        t = t.clamp(max=table[-1])
        after = torch.searchsorted(table, t).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        step = (after - 1 + (t - low) / (high - low)).clamp(min=0)  # between steps, interpolated
        t = t.reshape(-1, 1, 1, 1)
        length = ((1 - t) ** 2 + t**2).sqrt()
        return (self._network(z / length, step, step, labels, guidance) - z) / (1 - t)


def _ordered(names) -> list[str]:
    """As their tokens stand: label, guidance, then the times as they come."""
    return sorted(names, key=lambda name: [*TOKENS, name].index(name))


class TimeEmbedder(nn.Module):
    """Times (n,) → float32 (n, hidden_size)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t: Tensor) -> Tensor:
        """See the class."""
        half = FREQUENCIES // 2
        frequencies = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
        angles = t[:, None] * torch.as_tensor(frequencies, device=t.device)
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return linear(F.silu(linear(embedding, self.mlp[0])), self.mlp[2])


class LabelEmbedder(nn.Module):
    """Labels (n,) → float32 (n, hidden_size)."""

    def __init__(self, count: int, hidden_size: int):
        super().__init__()
        self.embedding_table = nn.Embedding(count, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """See the class."""
        return self.embedding_table(labels).float()


class PatchEmbedder(nn.Module):
    """(n, channels, height, width) → (n, tokens, hidden_size), of the weights' type."""

    def __init__(self, channels: int, hidden_size: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, hidden_size, kernel_size=patch, stride=patch)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        return self.proj(z.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention and MLP, each after a norm, and gated: by the condition, or by parameters."""

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        mlp_size: int,
        mlp: str,
        qk_norm: bool,
        norm: str,
        conditioning: str,
    ):
        super().__init__()
        self.norm = norm
        self.attn = Attention(hidden_size, heads, qk_norm)
        self.mlp = MLP(hidden_size, mlp_size, mlp)
        if conditioning == "tokens":
            self.norm1, self.norm2 = Scale(hidden_size), Scale(hidden_size)
            self.attn_gate = nn.Parameter(torch.zeros(hidden_size))
            self.mlp_gate = nn.Parameter(torch.zeros(hidden_size))
        else:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)
            )

    def forward(self, x: Tensor, c: Tensor | None, places: np.ndarray | None) -> Tensor:
        """x float32 (n, tokens, d), c (n, d) after its SiLU, places as in `rope` → as x."""
        if c is None:
            first, second = ((scale.weight.float() - 1,) for scale in (self.norm1, self.norm2))
            gates = self.attn_gate.float(), self.mlp_gate.float()
        else:
            modulation = self.adaLN_modulation[1](c.to(self.adaLN_modulation[1].weight.dtype))
            parts = modulation.float()[:, None].chunk(6, dim=-1)
            first, second, gates = parts[1::-1], parts[4:2:-1], parts[2::3]
        x = x + gates[0] * self.attn(modulated(x, self.norm, *first), places).float()
        return x + gates[1] * self.mlp(modulated(x, self.norm, *second)).float()


class Scale(nn.Module):
    """The learnt scale of a norm."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, heads: int, qk_norm: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.q_norm = Scale(hidden_size // heads) if qk_norm else None
        self.k_norm = Scale(hidden_size // heads) if qk_norm else None

    def forward(self, x: Tensor, places: np.ndarray | None) -> Tensor:
        """(n, tokens, d) → the same, of the weights' type."""
        n, tokens, d = x.shape
        parts = self.qkv(x.to(self.qkv.weight.dtype)).reshape(n, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        q, k = (self._turned(*part, places) for part in ((q, self.q_norm), (k, self.k_norm)))
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(n, tokens, d))

    def _turned(self, x: Tensor, norm: Scale | None, places: np.ndarray | None) -> Tensor:
        """Queries or keys after their norm and `rope`, in float32 and then of their own type."""
        h = x if norm is None else rms(x.float()) * norm.weight.float()
        return (h if places is None else rope(h.float(), places)).to(x.dtype)


class MLP(nn.Module):
    """Two layers with a GELU (tanh form) or a gate between."""

    def __init__(self, hidden_size: int, mlp_size: int, kind: str):
        super().__init__()
        self.gated = kind == "swiglu"
        self.fc1 = nn.Linear(hidden_size, (1 + self.gated) * mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, d) → the same, of the weights' type."""
        h = self.fc1(x.to(self.fc1.weight.dtype)).float()
        if self.gated:
            gate, value = h.chunk(2, dim=-1)
            h = F.silu(gate) * value
        else:
            h = F.gelu(h, approximate="tanh")
        return self.fc2(h.to(self.fc2.weight.dtype))


class FinalLayer(nn.Module):
    """Modulated or scaled tokens → pixels, float32."""

    def __init__(self, hidden_size: int, features: int, norm: str, conditioning: str):
        super().__init__()
        self.kind = norm
        self.linear = nn.Linear(hidden_size, features)
        if conditioning == "tokens":
            self.norm = Scale(hidden_size)
        else:
            self.adaLN_modulation = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size)
            )

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """x (n, tokens, d), c (n, d) after its SiLU → (n, tokens, features)."""
        if c is None:
            how = (self.norm.weight.float() - 1,)
        else:
            modulation = self.adaLN_modulation[1](c.to(self.adaLN_modulation[1].weight.dtype))
            how = modulation.float()[:, None].chunk(2, dim=-1)[::-1]
        return linear(modulated(x, self.kind, *how), self.linear)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in float32, whatever its weights' type."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated(x: Tensor, norm: str, scale: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    """A norm without parameters, then x · (1 + scale) + shift, float32."""
    x = x.float()
    normed = rms(x) if norm == "rms" else F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return normed * (1 + scale) + shift


def rms(x: Tensor) -> Tensor:
    """x over the root of its mean square along the last axis."""
    return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()


def rope(x: Tensor, places: np.ndarray) -> Tensor:
    """Turns channels of x, float32 (n, heads, tokens, d), by angles of row and column.

    Args:
      places: (tokens, 2). The first half of d is turned by the row, the second by the column; in
        each the first half of channels and the second are the parts of complex numbers.
    """
    quarter = x.shape[-1] // 4
    frequencies = (10_000.0 ** (-np.arange(quarter) / quarter)).astype(np.float32)
    angles = torch.as_tensor(places[:, :, None] * frequencies, device=x.device)
    cos, sin = angles.cos(), angles.sin()  # (tokens, row or column, quarter)
    a, b = x.reshape(*x.shape[:3], 2, 2, quarter).unbind(dim=-2)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-2).reshape(x.shape)


def grid_places(h: int, w: int, before: int) -> np.ndarray:
    """Row and column of each patch, after `before` tokens at 0: float32 (tokens, 2)."""
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    places = np.stack([row.reshape(-1), column.reshape(-1)], axis=1)
    return np.concatenate([np.zeros((before, 2)), places]).astype(np.float32)


def positions(h: int, w: int, size: int, device: torch.device) -> Tensor:
    """Fixed sines and cosines of the patch's column, then its row: float32 (h·w, size)."""
    quarter = size // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.as_tensor(np.concatenate(parts, axis=1).astype(np.float32), device=device)
