"""Turns a small Llama into a larger, dense one that computes the same function.

A step of a 6M-parameter model costs less than the engine around it, so no
method of speeding up decoding can show on it. The inflated model costs what a
real one of its size costs and still predicts what the small one predicts.

Notation: ``h`` and ``H`` are the hidden sizes of the small and the large model,
``P`` is a random ``[H, h]`` matrix with orthonormal columns, ``x`` the small
model's residual stream. The large model's residual stream is ``P x``:

- embedding ``E`` becomes ``E P^T``; a weight that writes into the stream
  becomes ``P W``;
- ``mean((P x)^2) = h/H mean(x^2)``, so RMSNorm with weights of one and
  ``eps h/H`` gives ``sqrt(H/h) P norm(x)``; a weight that reads behind a norm
  with weights ``g`` becomes ``sqrt(h/H) W diag(g) P^T``;
- further heads and MLP neurons come in twins: the same reading weights, writing
  weights of opposite sign. What one writes the other takes away. Added layers
  consist of twins only.

All weights are dense and non-zero, so kernels do all of the work. In float32
the logits agree to rounding; in bfloat16 the twins cancel to rounding only, and
the larger model is a slightly noisy copy of the small one.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_specplugin.errors import SpecPluginError, UnsupportedError, complain
from vllm_specplugin.utils.env import cache_dir

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["basis", "inflate", "inflated_model"]

_VERSION = 1
"""Part of the cache key: raise it when the weights come out differently."""

_TOLERANCE = 1e-4
"""Largest difference of float32 logits allowed, relative to the largest logit."""


def inflated_model(
    source: Path, *, hidden: int = 768, layers: int = 12, intermediate: int = 2048, seed: int = 0
) -> Path:
    """The inflated model of ``source``, made on first use and kept in the cache.

    Raises:
        SpecPluginError: see :func:`inflate`.
    """
    shape = f"{hidden}x{layers}x{intermediate}"
    digest = hashlib.sha256(f"{_VERSION} {shape} {seed}".encode())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        digest.update((source / name).read_bytes())
    return made_once(
        f"{source.name}-{shape}-{digest.hexdigest()[:16]}",
        lambda made: inflate(
            source, made, hidden=hidden, layers=layers, intermediate=intermediate, seed=seed
        ),
    )


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache's models, made on first use.

    It appears in one step: a process that sees it sees all of it, and of two that
    make it at once one wins and both use the winner's.

    Args:
        name: of the folder; of what went into it, too.
        make: writes it to the path given.
    """
    home = cache_dir() / "models"
    final = home / name
    if final.is_dir():
        return final
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".making-") as folder:
        made = Path(folder) / name
        make(made)
        try:
            made.rename(final)
        except OSError:
            if not final.is_dir():  # nobody else has published it meanwhile
                raise
    return final


def inflate(
    source: Path,
    destination: Path,
    *,
    hidden: int = 768,
    layers: int = 12,
    intermediate: int = 2048,
    seed: int = 0,
) -> None:
    """Writes a larger model with the function of ``source``.

    Args:
        source: folder of a Llama with as many key heads as query heads.
        destination: folder to write; weights are stored as bfloat16.
        hidden: ``H``, a multiple of the head size.
        layers: number of layers, at least as many as ``source`` has.
        intermediate: MLP neurons per layer.
        seed: of ``P`` and of the twins.

    Raises:
        UnsupportedError: ``source`` cannot be brought to this shape.
        SpecPluginError: the larger model's logits differ; nothing is written.
    """
    import torch
    from transformers import LlamaForCausalLM

    small = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    _check_shape(small.config, hidden, layers, intermediate)
    config = _config(small.config, hidden, layers, intermediate)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        large = LlamaForCausalLM(config).float().eval()
        large.load_state_dict(_weights(small, config, seed))
    _check_logits(small.eval(), large)
    destination.mkdir(parents=True, exist_ok=True)
    large.to(torch.bfloat16).save_pretrained(destination)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, destination / name)


def _check_shape(small: LlamaConfig, hidden: int, layers: int, intermediate: int) -> None:
    size = f"hidden {hidden}, {layers} layers, intermediate {intermediate}"
    head, heads = small.head_dim, small.num_attention_heads
    least = (small.hidden_size, small.num_hidden_layers, small.intermediate_size)
    twins = 2 * head
    problem = None
    if small.num_key_value_heads != heads:
        problem = "a source with as many key heads as query heads"
    elif hidden < least[0] or layers < least[1] or intermediate < least[2]:
        problem = "at least hidden {}, {} layers, intermediate {}".format(*least)
    elif (hidden - heads * head) % twins or (layers > least[1] and hidden % twins):
        problem = f"an even number of heads of {head} added in every layer"
    elif (intermediate - least[2]) % 2 or (layers > least[1] and intermediate % 2):
        problem = "an even number of MLP neurons added in every layer"
    if problem:
        raise UnsupportedError(complain(f"inflation to {size}", problem, "choose another shape"))


def _config(small: LlamaConfig, hidden: int, layers: int, intermediate: int) -> LlamaConfig:
    from transformers import LlamaConfig

    values: dict[str, Any] = small.to_dict()
    heads = hidden // small.head_dim
    values |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "rms_norm_eps": small.rms_norm_eps * small.hidden_size / hidden,
        "tie_word_embeddings": False,
    }
    return LlamaConfig.from_dict(values)


def basis(h: int, H: int, generator: Generator) -> Tensor:
    """``P``."""
    import torch

    noise = torch.randn(H, h, generator=generator, dtype=torch.float64)
    P: Tensor = torch.linalg.qr(noise)[0].float()
    return P


def _weights(small: LlamaForCausalLM, config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """The larger model's state, from the small one's."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = small.state_dict()
    h, H = small.config.hidden_size, config.hidden_size
    P = basis(h, H, generator)

    def read(weight: Tensor, norm: Tensor) -> Tensor:
        return weight @ (norm[:, None] * P.T * math.sqrt(h / H))

    embedding = state["model.embed_tokens.weight"]
    weights = {
        "model.embed_tokens.weight": embedding @ P.T,
        "model.norm.weight": torch.ones(H),
        "lm_head.weight": read(state["lm_head.weight"], state["model.norm.weight"]),
    }
    parts: tuple[tuple[str, str, tuple[str, ...], str, int], ...] = (
        ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj", H),
        (
            "mlp",
            "post_attention_layernorm",
            ("gate_proj", "up_proj"),
            "down_proj",
            config.intermediate_size,
        ),
    )
    for layer in range(config.num_hidden_layers):
        real = layer < small.config.num_hidden_layers
        for part, norm, readers, writer, width in parts:
            here = f"model.layers.{layer}"
            weights[f"{here}.{norm}.weight"] = torch.ones(H)
            kept = 0
            for name in readers:
                key = f"{here}.{part}.{name}.weight"
                old = read(state[key], state[f"{here}.{norm}.weight"]) if real else None
                kept = 0 if old is None else len(old)
                weights[key] = _join(old, _twins(width - kept, H, 1, generator))
            key = f"{here}.{part}.{writer}.weight"
            old = (P @ state[key]).T if real else None
            new = _join(old, _twins(width - kept, H, -1, generator))
            weights[key] = new.T.contiguous()
    return weights


def _twins(rows: int, columns: int, sign: int, generator: Generator) -> Tensor:
    """``rows`` random rows whose second half is ``sign`` times the first."""
    import torch

    half = torch.randn(rows // 2, columns, generator=generator)
    half *= 0.5 / math.sqrt(columns)
    return torch.cat([half, sign * half])


def _join(old: Tensor | None, new: Tensor) -> Tensor:
    import torch

    return new if old is None else torch.cat([old, new])


def _check_logits(small: LlamaForCausalLM, large: LlamaForCausalLM) -> None:
    """Compares the two models' float32 logits on random tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(small.config.vocab_size, (2, 64), generator=generator, dtype=torch.long)
    with torch.no_grad():
        expected, found = small(tokens).logits, large(tokens).logits
    error = ((expected - found).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE:  # so that NaN fails too
        raise SpecPluginError(
            complain(
                f"the inflated model's logits differ by {error:.1e} of their scale",
                f"at most {_TOLERANCE:.0e}",
                "check that the source is an intact Llama without biases",
            )
        )
