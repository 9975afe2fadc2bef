"""The targets: the embedded one, or a far smaller one with random weights.

What a random model emits must depend on every token it attends to, or wrong masks,
positions and cache rows would go unseen: weights are scaled so that attention is
sharp and weighs as much as the token itself. Its distribution at temperature 1 is
neither flat nor certain, and wide enough for near ties to be rare.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

from examples.demo.inflate import made_once
from examples.demo.models import model_path

__all__ = ["ADAPTERS", "make_adapters", "make_model"]

ADAPTERS = 2
"""LoRA adapters of the random model, numbered from 1."""
_HIDDEN, _HEADS, _HEAD, _LAYERS, _RANK = 64, 2, 32, 2, 8
_VERSION = 1
"""Of what is written below: raise it with every change."""
_LOGITS = 2.5
"""Standard deviation of the logits."""


def make_model(name: str) -> Path:
    """The folder of a model; ``tiny`` is made on first use and kept."""
    if name != "tiny":
        return model_path("target")
    return made_once(f"fuzz-{_VERSION}", _write_model)


def make_adapters() -> list[Path]:
    """Folders of LoRA adapters for the random model."""
    made = made_once(f"fuzz-adapters-{_VERSION}", _write_adapters)
    return [made / str(number) for number in range(1, ADAPTERS + 1)]


def _write_model(folder: Path) -> None:
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    target = model_path("target")
    config = LlamaConfig(
        vocab_size=AutoConfig.from_pretrained(target).vocab_size,
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=1,
        head_dim=_HEAD,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "norm" not in key:
                scale = _scale(key) * (weight.shape[-1] ** -0.5)
                weight.normal_(0.0, scale, generator=generator)
    model.save_pretrained(folder)
    for part in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target / part, folder / part)


def _scale(key: str) -> float:
    """Standard deviation of a layer's outputs, for inputs of about one."""
    if "embed" in key:
        return math.sqrt(_HIDDEN)
    if "q_proj" in key or "k_proj" in key:
        return 1.6  # sharp attention
    if "o_proj" in key or "v_proj" in key:
        return 2.0  # that weighs as much as the token itself
    return _LOGITS if "lm_head" in key else 1.0


def _write_adapters(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    shapes = {"q_proj": _HEADS * _HEAD, "v_proj": _HEAD}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": 2 * _RANK,
        "target_modules": list(shapes),
        "bias": "none",
    }
    for number in range(1, ADAPTERS + 1):
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(_LAYERS):
            for part, out in shapes.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{part}"
                for side, shape in (("A", (_RANK, _HIDDEN)), ("B", (out, _RANK))):
                    drawn = torch.randn(shape, generator=generator)
                    weights[f"{key}.lora_{side}.weight"] = drawn * shape[1] ** -0.5
        place = folder / str(number)
        place.mkdir(parents=True)
        save_file(weights, place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
