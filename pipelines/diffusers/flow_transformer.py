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


class FlowTransformer2DModel(ModelMixin, ConfigMixin):
    """A transformer on patches, modulated by times and label (adaLN-Zero).

    Args:
      sample_size: (height, width) of the input.
      in_channels: of input and output.
      patch_size: the side of a patch; it divides height and width.
      num_layers, hidden_size, num_attention_heads, mlp_ratio: of the blocks.
      num_classes: labels are 0 to num_classes − 1, and num_classes for none; 0: no labels.
      time_inputs: the times that the network is told, of t, r and t-r, by commas.
      time_scale: what the times are multiplied by before they are embedded.
      prediction: velocity; or noise, which DiT's diffusion predicts and `forward` turns into one.
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
    ):
        super().__init__()
        for name in time_inputs.split(","):
            self.add_module(EMBEDDERS[name], TimeEmbedder(hidden_size))
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes + 1, hidden_size)
        self.x_embedder = PatchEmbedder(in_channels, hidden_size, patch_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_attention_heads, round(mlp_ratio * hidden_size))
            for _ in range(num_layers)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        start_timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Returns u(z, r, t), float32 of the shape of z.

        Args:
          hidden_states: z, (n, channels, height, width).
          timestep: t, (n,) in [0, 1].
          start_timestep: r, (n,), at most t; None: t, for the velocity of the flow.
          class_labels: (n,) whole numbers; None: without a label.
        """
        z, t = hidden_states.float(), timestep.float()
        r = t if start_timestep is None else start_timestep.float()
        if self.config.prediction == "noise":
            u = self._velocity_from_noise(z, t, class_labels)
        else:
            u = self._network(z, r, t, class_labels)
        return Transformer2DModelOutput(sample=u) if return_dict else (u,)

    def _network(self, z: Tensor, r: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """What the transformer puts out, float32 (n, channels, height, width)."""
        patch = self.config.patch_size
        n, channels, height, width = z.shape
        grid = height // patch, width // patch
        c = F.silu(self._condition(r, t, labels))
        x = self.x_embedder(z).float() + positions(*grid, self.config.hidden_size, z.device)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c).reshape(n, *grid, patch, patch, channels)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(n, channels, height, width)

    def _condition(self, r: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The sum of the embeddings of times and label, float32 (n, hidden_size)."""
        times = {"t": t, "r": r, "t-r": t - r}
        told = self.config.time_inputs.split(",")
        scale = self.config.time_scale
        c = sum(getattr(self, EMBEDDERS[name])(scale * times[name]) for name in told)
        if self.config.num_classes:
            if labels is None:
                labels = torch.full_like(t, self.config.num_classes, dtype=torch.long)
            c = c + self.y_embedder(labels)
        return c

    def _velocity_from_noise(self, z: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
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
        return (self._network(z / length, step, step, labels) - z) / (1 - t)


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
    """Attention and MLP, each shifted, scaled and gated by the condition."""

    def __init__(self, hidden_size: int, heads: int, mlp_size: int):
        super().__init__()
        self.attn = Attention(hidden_size, heads)
        self.mlp = MLP(hidden_size, mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x float32 (n, tokens, d), c (n, d) after its SiLU → as x."""
        modulation = self.adaLN_modulation[1](c.to(self.adaLN_modulation[1].weight.dtype))
        parts = modulation.float()[:, None].chunk(6, dim=-1)
        x = x + parts[2] * self.attn(modulated(x, *parts[:2])).float()
        return x + parts[5] * self.mlp(modulated(x, *parts[3:5])).float()


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, d) → the same, of the weights' type."""
        n, tokens, d = x.shape
        parts = self.qkv(x.to(self.qkv.weight.dtype)).reshape(n, tokens, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        return self.proj(h.transpose(1, 2).reshape(n, tokens, d))


class MLP(nn.Module):
    """Two layers with a GELU (tanh form) between."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(n, tokens, d) → the same, of the weights' type."""
        h = F.gelu(self.fc1(x.to(self.fc1.weight.dtype)).float(), approximate="tanh")
        return self.fc2(h.to(self.fc2.weight.dtype))


class FinalLayer(nn.Module):
    """Modulated tokens → pixels, float32."""

    def __init__(self, hidden_size: int, features: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (n, tokens, d), c (n, d) after its SiLU → (n, tokens, features)."""
        modulation = self.adaLN_modulation[1](c.to(self.adaLN_modulation[1].weight.dtype))
        return linear(modulated(x, *modulation.float()[:, None].chunk(2, dim=-1)), self.linear)


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """The layer in float32, whatever its weights' type."""
    return F.linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without parameters, then x · (1 + scale) + shift, float32."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def positions(h: int, w: int, size: int, device: torch.device) -> Tensor:
    """Fixed sines and cosines of the patch's column, then its row: float32 (h·w, size)."""
    quarter = size // 4
    frequencies = 10_000.0 ** (-np.arange(quarter) / quarter)
    row, column = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (column, row)]
    parts = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    return torch.as_tensor(np.concatenate(parts, axis=1).astype(np.float32), device=device)
