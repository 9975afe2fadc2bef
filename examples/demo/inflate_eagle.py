"""An EAGLE head of a small model, made to fit its inflated copy.

With the notation of :mod:`.inflate`, ``g`` the small model's last norm: where the
small model's last hidden state is ``z``, the large one's is ``y = sqrt(H/h) P n``
with ``z = g n``. A large head can use the large lm_head if its stream is
``sqrt(H/h) P (x / g)`` where the small one's is ``x``. The norm in between asks for
a length in proportion to that of ``x``, which a part makes up that nothing reads::

    s = W x,   W = sqrt(H/h) P diag(1/g) + Q diag(sqrt(c - H/h / g^2))

with orthonormal ``Q`` across from ``P`` and ``c`` the least that leaves no root
negative, so that ``|s|^2 = c |x|^2``. What reads a stream or a state of the target
reads it with ``B = sqrt(h/H) diag(g) P^T``: ``B y = z`` and ``B s = x``.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.demo.inflate import basis, made_once

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["inflate_eagle", "inflated_eagle"]

_VERSION = 1


def inflated_eagle(
    head: Path, source: Path, *, hidden: int = 768, intermediate: int = 2048, seed: int = 0
) -> Path:
    """A head for ``inflated_model(source)``, made on first use, kept in the cache.

    Args:
        head: folder of an EAGLE head for ``source``.
        source: folder of the small model.
        hidden, intermediate, seed: as the model's.
    """
    shape = f"{hidden}x{intermediate}"
    digest = hashlib.sha256(f"{_VERSION} {shape} {seed}".encode())
    for folder in (head, source):
        for name in ("config.json", "model.safetensors"):
            digest.update((folder / name).read_bytes())
    return made_once(
        f"{head.name}-{shape}-{digest.hexdigest()[:16]}",
        lambda made: inflate_eagle(
            head, source, made, hidden=hidden, intermediate=intermediate, seed=seed
        ),
    )


def inflate_eagle(
    head: Path, source: Path, destination: Path, *, hidden: int, intermediate: int, seed: int
) -> None:
    """Writes the larger head: more attention heads and neurons, all of them idle.

    ``hidden`` is at least twice the small model's.
    """
    import torch
    from safetensors.torch import load_file

    from examples.train_heads.eagle import EagleHead, EagleShape, load_eagle, save_eagle

    small = load_eagle(head)
    h, size = small.shape.hidden_size, small.shape.head_dim
    state = load_file(source / "model.safetensors")
    W, B, c = _bases(state["model.norm.weight"].float(), hidden, seed)
    P = basis(h, hidden, torch.Generator().manual_seed(seed))
    scale = c * h / hidden
    large = EagleHead(
        EagleShape(
            hidden_size=hidden,
            intermediate_size=intermediate,
            heads=hidden // size,
            vocab_size=small.shape.vocab_size,
            positions=small.shape.positions,
            rope_theta=small.shape.rope_theta,
            eps=small.shape.eps * scale,
        )
    ).requires_grad_(False)
    for parameter in large.parameters():
        parameter.zero_()
    embedded, feature = small.fc.weight.detach().split(h, dim=1)
    large.fc.weight.copy_(W @ torch.cat([embedded @ P.T, feature @ B], dim=1))
    new: Any = large.layers[0]
    old: Any = small.layers[0]
    new.post_attention_layernorm.weight.fill_(1.0)
    behind = math.sqrt(scale) * old.post_attention_layernorm.weight.detach()[:, None]
    for part, names, norm, writer in (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), torch.ones(1), "o_proj"),
        ("mlp", ("gate_proj", "up_proj"), behind, "down_proj"),
    ):
        wide, narrow = getattr(new, part), getattr(old, part)
        for name in names:
            weight = getattr(narrow, name).weight.detach()
            getattr(wide, name).weight[: len(weight)] = weight @ (norm * B)
        weight = getattr(narrow, writer).weight.detach()
        getattr(wide, writer).weight[:, : weight.shape[1]] = W @ weight
    save_eagle(large, destination, torch.float32)


def _bases(norm: Tensor, hidden: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """``W``, ``B`` and ``c``."""
    import torch

    h = len(norm)
    P = basis(h, hidden, torch.Generator().manual_seed(seed)).double()
    Q = torch.linalg.qr(P, mode="complete")[0][:, h : 2 * h]
    g, ratio = norm.double(), hidden / h
    c = float((ratio / g**2).max())
    W = math.sqrt(ratio) * P / g + Q * (c - ratio / g**2).clamp(min=0).sqrt()
    B = math.sqrt(1 / ratio) * g[:, None] * P.T
    return W.float(), B.float(), c
