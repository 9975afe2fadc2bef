"""EAGLE heads: one decoder layer that continues the target's features.

At position ``i`` a head reads the target's feature ``f_i`` and the *next* token
``x_{i+1}``, and guesses the token after it (2401.15077)::

    e_i = W [embed(x_{i+1}); f_i]
    g_i = layer(e_0 .. e_i)          q(. | x_<=i+1) = lm_head(g_i)

EAGLE's feature is the target's last hidden state, which the head's output ``g_i``
stands in for at ``i + 1`` once drafting goes beyond what the target has read.
EAGLE-3 (2503.01840) reads three layers of the target, ``f_i = W [h^a; h^b; h^c]``,
has norms of its own before the layer and before the lm_head, and hands on what the
layer puts out before the latter.

Embedding and lm_head are the target's. Weights and configuration have the names of
the public checkpoints, which vLLM loads. This is the reference; in an engine vLLM's
own implementation runs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EagleHead", "EagleShape", "load_eagle", "save_eagle"]

Past = tuple[Tensor, Tensor]
"""Keys and values, ``[batch, heads, length, head_dim]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EagleShape:
    """What is stored in ``config.json``."""

    hidden_size: int
    intermediate_size: int
    heads: int
    vocab_size: int
    positions: int
    """``max_position_embeddings``."""
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    layers: tuple[int, ...] = ()
    """Of an EAGLE-3 head, after how many of its layers the target is read."""

    @property
    def third(self) -> bool:
        """Whether it is an EAGLE-3 head."""
        return bool(self.layers)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    def to_config(self) -> dict[str, Any]:
        """As the public checkpoints have it."""
        read = {"eagle_aux_hidden_state_layer_ids": list(self.layers)}
        return {
            **({"eagle_config": read} if self.third else {}),
            "architectures": ["LlamaForCausalLMEagle3" if self.third else "LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.eps,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    @classmethod
    def of(cls, config: dict[str, Any]) -> EagleShape:
        """From ``config.json``."""
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=config["num_attention_heads"],
            vocab_size=config["vocab_size"],
            positions=config["max_position_embeddings"],
            rope_theta=config["rope_theta"],
            eps=config["rms_norm_eps"],
            layers=tuple(
                config.get("eagle_config", {}).get("eagle_aux_hidden_state_layer_ids", ())
            ),
        )


class _Attention(nn.Module):
    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        width, size = shape.hidden_size, shape.hidden_size * (1 + shape.third)
        self.q_proj = nn.Linear(size, width, bias=False)
        self.k_proj = nn.Linear(size, width, bias=False)
        self.v_proj = nn.Linear(size, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)


class _MLP(nn.Module):
    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        width, inner = shape.hidden_size, shape.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Layer(nn.Module):
    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _MLP(shape)
        norms = ["post_attention_layernorm"]
        if shape.third:
            norms += ["input_layernorm", "hidden_norm"]
        for name in norms:
            setattr(self, name, nn.RMSNorm(shape.hidden_size, eps=shape.eps))


class EagleHead(nn.Module):
    """A head; parameters have the names of EAGLE's and EAGLE-3's checkpoints."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.hidden_size
        self.fc = nn.Linear(width * (len(shape.layers) or 2), width, bias=False)
        layer = _Layer(shape)
        if shape.third:
            self.midlayer = layer
            self.norm = nn.RMSNorm(width, eps=shape.eps)
        else:
            self.layers = nn.ModuleList([layer])
        half = shape.head_dim // 2
        powers = torch.arange(half, dtype=torch.float32) / half
        self.register_buffer("_rates", shape.rope_theta**-powers, persistent=False)
        self._rates: Tensor

    def features(self, states: Tensor) -> Tensor:
        """The target's states to what :meth:`forward` reads.

        Args:
            states: ``[..., hidden_size]`` last hidden states or, for EAGLE-3,
                ``[..., 3 * hidden_size]`` of three layers.
        """
        if not self.shape.third:
            return states
        out: Tensor = self.fc(states)
        return out

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor, Past]:
        """One pass over some rows.

        Args:
            embedded: ``[batch, rows, hidden_size]`` of the tokens *after* each row's.
            features: ``[batch, rows, hidden_size]``.
            positions: ``[batch, rows]`` or ``[rows]``.
            mask: ``[rows, past + rows]`` what each row sees.
            past: keys and values of earlier rows.

        Returns:
            ``[batch, rows, hidden_size]`` what the lm_head reads, the same of
            what the rows after these take for features, and all keys and values.
        """
        layer: Any = self.midlayer if self.shape.third else self.layers[0]
        if self.shape.third:
            residual = features
            x = torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(features)], -1)
        else:
            x = residual = self.fc(torch.cat([embedded, features], -1))
        out, past = self._attend(layer.self_attn, x, positions, mask, past)
        residual = residual + out
        out = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return (self.norm(out) if self.shape.third else out), out, past

    def _attend(
        self, weights: Any, x: Tensor, positions: Tensor, mask: Tensor, past: Past | None
    ) -> tuple[Tensor, Past]:
        split = (*x.shape[:2], self.shape.heads, self.shape.head_dim)
        q, k, v = (
            project(x).view(split).transpose(1, 2)
            for project in (weights.q_proj, weights.k_proj, weights.v_proj)
        )
        angles = positions[..., None].float() * self._rates
        if angles.ndim == 3:
            angles = angles[:, None]
        q, k = _turn(q, angles), _turn(k, angles)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return weights.o_proj(out.transpose(1, 2).flatten(2)), (k, v)


def _turn(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding, halves."""
    cos, sin = angles.cos(), angles.sin()
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def save_eagle(head: EagleHead, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Writes ``config.json`` and weights."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {"dtype": str(dtype).removeprefix("torch.")}
    config = json.dumps(head.shape.to_config() | stored, indent=2)
    (folder / "config.json").write_text(config + "\n")
    state = {
        name: value.detach().to("cpu", dtype).contiguous()
        for name, value in head.state_dict().items()
    }
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def load_eagle(folder: Path) -> EagleHead:
    """Reads what :func:`save_eagle` wrote, into float32."""
    config = json.loads((folder / "config.json").read_text())
    head = EagleHead(EagleShape.of(config))
    head.load_state_dict(load_file(folder / "model.safetensors"))
    return head.float()
