"""The targets: the embedded one, or a far smaller one with random weights.

What a random model emits must depend on every token it attends to, or wrong masks,
positions and cache rows would go unseen: weights are scaled so that attention is
sharp and weighs as much as the token itself. Its distribution at temperature 1 is
neither flat nor certain, and wide enough for near ties to be rare.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from vllm_specplugin.demo.models import model_path

__all__ = ["ADAPTERS", "make_adapters", "make_model"]

ADAPTERS = 2
"""LoRA adapters of the random model, numbered from 1."""
_HIDDEN, _HEADS, _HEAD, _LAYERS, _RANK = 64, 2, 32, 2, 8
_LOGITS = 2.5
"""Standard deviation of the logits."""


def make_model(name: str, folder: Path) -> Path:
    """The folder of a model; ``tiny`` is made in ``folder`` if it is not there."""
    target = model_path("target")
    if name != "tiny":
        return target
    made = folder / "tiny"
    if (made / "config.json").is_file():
        return made
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    vocab = AutoConfig.from_pretrained(target).vocab_size
    config = LlamaConfig(
        vocab_size=vocab,
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
            if "norm" in key:
                continue
            scale = weight.shape[-1] ** -0.5
            if "embed" in key:
                scale = 1.0
            elif "q_proj" in key or "k_proj" in key:
                scale *= 1.6  # sharp attention
            elif "o_proj" in key or "v_proj" in key:
                scale *= 2.0  # that weighs as much as the token itself
            elif "lm_head" in key:
                scale *= _LOGITS
            weight.normal_(0.0, scale, generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        whole = Path(place) / "tiny"
        model.save_pretrained(whole)
        for part in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(target / part, whole / part)
        with suppress(OSError):  # another process was first
            whole.rename(made)
    return made


def make_adapters(folder: Path) -> list[Path]:
    """Folders of LoRA adapters for the random model, made if they are not there."""
    made = [folder / f"adapter{number}" for number in range(1, ADAPTERS + 1)]
    if all((place / "adapter_config.json").is_file() for place in made):
        return made
    import torch
    from safetensors.torch import save_file

    shapes = {"q_proj": _HEADS * _HEAD, "v_proj": _HEAD}
    for number, place in enumerate(made, start=1):
        place.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(number)
        weights = {}
        for layer in range(_LAYERS):
            for part, out in shapes.items():
                key = f"base_model.model.model.layers.{layer}.self_attn.{part}"
                for side, shape in (("A", (_RANK, _HIDDEN)), ("B", (out, _RANK))):
                    drawn = torch.randn(shape, generator=generator)
                    weights[f"{key}.lora_{side}.weight"] = drawn * shape[1] ** -0.5
        save_file(weights, place / "adapter_model.safetensors")
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": _RANK,
            "lora_alpha": 2 * _RANK,
            "target_modules": list(shapes),
            "bias": "none",
        }
        (place / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    return made
