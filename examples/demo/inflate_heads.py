"""Medusa heads of a small model, made to fit its inflated copy.

With the notation of :mod:`.inflate`, ``g`` the small model's last norm: where the
small model's last hidden state is ``z``, the large one's is ``y = sqrt(H/h) P n``
with ``z = g n``. So ``z = B y`` for ``B = sqrt(h/H) diag(g) P^T``. A block adds
``SiLU(W z + b)`` to ``z``. The large one adds it to the first ``h`` places of
``y``, where a reading matrix ``R`` finds it again if it becomes ``R X`` with::

    X = [I | M],   X y = B y for every y that the model writes

which holds for ``M = (B P - P_top) pinv(P_bottom)``. An lm_head ``L`` becomes
``L X``, that of tied heads too: the model's own reads something else.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from examples.demo.inflate import basis, made_once

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["inflate_heads", "inflated_heads"]

_VERSION = 2


def inflated_heads(heads: Path, source: Path, *, hidden: int = 768, seed: int = 0) -> Path:
    """Heads for ``inflated_model(source)``, made on first use, kept in the cache.

    Args:
        heads: folder of heads for ``source``, as ``save_heads`` writes it.
        source: folder of the small model.
        hidden: as the model's.
        seed: as the model's.
    """
    digest = hashlib.sha256(f"{_VERSION} {hidden} {seed}".encode())
    files = [heads / "config.json", heads / "medusa_lm_head.safetensors"]
    if (measured := heads / "calibration.json").is_file():
        files.append(measured)
    for path in (*files, source / "model.safetensors"):
        digest.update(path.read_bytes())
    return made_once(
        f"{heads.name}-{hidden}-{digest.hexdigest()[:16]}",
        lambda made: inflate_heads(heads, source, made, hidden=hidden, seed=seed),
    )


def inflate_heads(heads: Path, source: Path, destination: Path, *, hidden: int, seed: int) -> None:
    """Writes the larger heads, with the measurements of the small ones."""
    import torch
    from transformers import LlamaForCausalLM

    from vllm_specplugin.heads.medusa import HeadShape, MedusaHeads, load_heads
    from vllm_specplugin.heads.medusa import save_heads as save

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    small = load_heads(
        heads, hidden_size=model.config.hidden_size, vocab_size=model.config.vocab_size
    )
    shape = HeadShape(
        heads=small.shape.heads,
        layers=small.shape.layers,
        hidden_size=hidden,
        vocab_size=small.shape.vocab_size,
        lm_heads=max(1, small.shape.lm_heads),
        bias=small.shape.bias,
    )
    large = MedusaHeads(shape).requires_grad_(False)
    X = _reader(model.model.norm.weight.detach(), hidden, seed)
    h = len(X)
    read: Any = large.blocks
    for wide, narrow in zip(read, small.blocks):
        for new, old in zip(wide, narrow):  # type: ignore[call-overload]
            new.weight.zero_()
            new.weight[:h] = old.weight @ X
            if shape.bias:
                new.bias.zero_()
                new.bias[:h] = old.bias
    written: Any = large.lm_heads
    tied = [model.lm_head]
    for new, old in zip(written, small.lm_heads or tied):
        new.weight.copy_(old.weight.detach() @ X)
    save(large, destination)
    if (measured := heads / "calibration.json").is_file():
        shutil.copyfile(measured, destination / "calibration.json")


def _reader(norm: Tensor, hidden: int, seed: int) -> Tensor:
    """``X``, ``[h, H]``."""
    import torch

    h = len(norm)
    P = basis(h, hidden, torch.Generator().manual_seed(seed)).double()
    B = math.sqrt(h / hidden) * norm.double()[:, None] * P.T
    M = (B @ P - P[:h]) @ torch.linalg.pinv(P[h:])
    return torch.cat([torch.eye(h, dtype=torch.float64), M], dim=1).float()
