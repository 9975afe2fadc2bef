"""The frozen target, through transformers: hidden states, lm_head, tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vllm_specplugin.errors import ConfigError, UnsupportedError, complain
from vllm_specplugin.tools.prompt_files import PromptFileError, read_prompts

__all__ = ["Target", "load_target", "read_tokens"]

_CLOSE = 1e-3


@dataclass(frozen=True, slots=True)
class Target:
    """A causal language model that is not trained."""

    model: Any
    device: str
    lm_head: Callable[[Tensor], Tensor]
    """``[n, hidden_size]`` to ``[n, vocab]`` logits."""
    hidden_size: int
    vocab_size: int

    @torch.no_grad()
    def hidden(self, tokens: Tensor) -> Tensor:
        """``[batch, length]`` tokens to ``[batch, length, hidden_size]``: what
        the lm_head reads."""
        found: Tensor = self.model.base_model(tokens).last_hidden_state
        return found


def load_target(name: str, device: str = "") -> Target:
    """Loads a model of the hub or of a folder in float32 (bfloat16 on a GPU).

    Args:
        name: hub id or path.
        device: where to; a GPU if there is one.

    Raises:
        ConfigError: there is no such model.
        UnsupportedError: its logits are more than its lm_head of its last hidden
            state, so heads on that state could not be verified here.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            complain(
                f"model {name!r} ({' '.join(str(error).split())[:300]})",
                "a causal language model: a hub id or a folder",
                "check the name, and the device if memory is short",
            )
        ) from error
    model = model.eval().requires_grad_(False)
    # What its author generates with, penalties and end of text, is not asked for.
    model.generation_config = GenerationConfig(pad_token_id=0)
    lm_head = model.get_output_embeddings()
    tokens = torch.arange(8, device=device)[None] + 3
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state
        expected = model(tokens).logits.float()
        found = None if lm_head is None else lm_head(hidden).float()
    scale = float(expected.abs().max()) + 1e-6
    if found is None or float((found - expected).abs().max()) > _CLOSE * scale:
        raise UnsupportedError(
            complain(
                f"model {name!r}, whose logits are not lm_head(last hidden state)",
                "a model with a plain lm_head",
                "use a proposer that needs no heads",
            )
        )
    return Target(model, device, lm_head, int(hidden.shape[-1]), int(found.shape[-1]))


def read_tokens(path: Path, model: str) -> npt.NDArray[np.int64]:
    """Token ids of a text: ``.npy`` of ids, ``.jsonl`` of strings or objects with
    ``prompt``, else plain text. Texts are separated by the end-of-text token.

    Raises:
        PromptFileError: the file is missing or empty.
    """
    if path.suffix == ".npy":
        try:
            stored: npt.NDArray[np.int64] = np.load(path).astype(np.int64).ravel()
            return stored
        except (OSError, ValueError) as error:
            raise PromptFileError(
                complain(f"{path} ({error})", "a file of token ids", "check the path")
            ) from error
    from transformers import AutoTokenizer

    if path.suffix == ".jsonl":
        texts = read_prompts(path)
    else:
        try:
            texts = [path.read_text("utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise PromptFileError(
                complain(f"text {path} ({error})", "a text file", "check the path")
            ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            complain(
                f"no tokenizer for {model!r} ({' '.join(str(error).split())[:200]})",
                "a model with its tokenizer",
                "check the name",
            )
        ) from error
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in texts:
        # In pieces of lines, so that a large file does not make one huge call.
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += end
    return np.array(ids, dtype=np.int64)
