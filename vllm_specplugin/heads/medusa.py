"""Medusa heads (2401.10774): what they compute, and the public checkpoint layout.

Let ``h`` be the target's last hidden state, what its lm_head reads, at the row
that emits the token at position ``n``. Head ``k`` (from 0) guesses the token at
``n + 1 + k``::

    z_0 = h,   z_(l+1) = z_l + SiLU(W_kl z_l + b_kl),   logits = L_k z

``L_k`` may be the head's own, one for all heads, or the target's (*tied*).
:func:`load_heads` reads all spellings of the names that vLLM 0.32 does
(``model_executor/models/medusa.py``): those of FasterDecoding's files,
``{k}.{l}.linear.weight``, ``{k}.{layers}.weight`` for ``L_k``, and vLLM's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vllm_specplugin.errors import ConfigError, complain

__all__ = [
    "CALIBRATION",
    "HeadShape",
    "MedusaHeads",
    "find_heads",
    "load_heads",
    "read_json",
    "save_heads",
]

CALIBRATION = "calibration.json"
"""Beside the heads: what ``examples/train_heads`` has measured."""

_FILES = (
    "medusa_lm_head.safetensors",
    "model.safetensors",
    "medusa_lm_head.pt",
    "pytorch_model.bin",
)
_PREFIX = re.compile(r"^(model\.)?medusa_heads?\.")
_BLOCK = re.compile(r"^(?:(\d+)\.(\d+)\.linear|blocks\.(\d+)\.layers\.(\d+))\.(weight|bias)$")
_LM_HEAD = re.compile(r"^(?:(\d+)\.\d+|lm_heads\.(\d+)|(lm_head))\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadShape:
    """What the heads of a checkpoint look like."""

    heads: int
    layers: int
    hidden_size: int
    vocab_size: int
    """Tokens that ``L_k`` has rows for."""
    lm_heads: int
    """How many ``L_k`` there are: one per head, one for all, or 0 if tied."""
    bias: bool = True
    logit_scale: float = 1.0


class MedusaHeads(nn.Module):
    """The heads."""

    def __init__(self, shape: HeadShape, token_map: Tensor | None = None) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Linear(size, size, bias=shape.bias) for _ in range(shape.layers))
            for _ in range(shape.heads)
        )
        self.lm_heads = nn.ModuleList(
            nn.Linear(size, shape.vocab_size, bias=False) for _ in range(shape.lm_heads)
        )
        self.token_map = token_map
        """``[vocab_size]`` token of each row of ``L_k``, ``None`` for itself."""
        self._tokens: int | None = None

    def states(self, hidden: Tensor) -> list[Tensor]:
        """``z`` behind the last layer of each head.

        Args:
            hidden: ``[n, hidden_size]``.
        """
        states = []
        for layers in self.blocks:
            z = hidden
            for layer in layers:  # type: ignore[attr-defined]
                z = z + nn.functional.silu(layer(z))
            states.append(z)
        return states

    def logits(self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What each head expects.

        Args:
            hidden: ``[n, hidden_size]``.
            lm_head: the target's, for heads that are tied to it.

        Returns:
            ``[heads, n, rows of L_k]``.
        """
        states = self.states(hidden)
        if len(self.lm_heads) > 1:
            found = torch.stack([L(z) for L, z in zip(self.lm_heads, states)])
        else:  # one product reads the matrix once
            head = self.lm_heads[0] if len(self.lm_heads) else lm_head
            assert head is not None, "tied heads need the target's lm_head"
            flat = head(torch.cat(states))
            found = flat.view(len(states), len(hidden), -1)
        scale = self.shape.logit_scale
        return found if scale == 1.0 else found * scale

    def token_logits(
        self, hidden: Tensor, lm_head: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """:meth:`logits` by token, ``[heads, n, tokens]`` float32; those that the
        heads do not know have none."""
        logits = self.logits(hidden, lm_head).float()
        if self.token_map is None:
            return logits
        if self._tokens is None:
            self._tokens = int(self.token_map.max()) + 1
            self.token_map = self.token_map.to(logits.device)
        whole = logits.new_full((*logits.shape[:2], self._tokens), float("-inf"))
        whole[..., self.token_map] = logits
        return whole


def load_heads(folder: Path, *, hidden_size: int = 0, vocab_size: int = 0) -> MedusaHeads:
    """Reads heads from a folder or a file.

    Args:
        folder: has one of the known files and perhaps ``config.json``.
        hidden_size: the target's, 0 if unknown.
        vocab_size: the target's, 0 if unknown.

    Returns:
        :class:`MedusaHeads` in float32.

    Raises:
        ConfigError: no such file, one that is not heads, or heads of another
            target.
    """
    path = _weights_file(folder)
    config = read_json(path.parent / "config.json")
    found = _sort(_read(path), path)
    shape, token_map = _shape(found, config, path, vocab_size)
    for what, has, wants in (
        ("hidden size", shape.hidden_size, hidden_size),
        ("vocabulary", _tokens(shape, token_map, config), vocab_size),
    ):
        if has and wants and has != wants:
            raise ConfigError(
                complain(
                    f"Medusa heads {path} with {what} {has}",
                    f"the target's, {wants}",
                    "use heads that were trained for this target",
                )
            )
    heads = MedusaHeads(shape, token_map)
    try:
        heads.load_state_dict({name: value.float() for name, value in found.items()})
    except RuntimeError as error:
        raise ConfigError(
            complain(
                f"{path}: {' '.join(str(error).split())}",
                "heads of one shape, each with the same layers",
                "check that the file is complete",
            )
        ) from error
    return heads.eval().requires_grad_(False)


def find_heads(name: str) -> Path:
    """A local folder or file, or a repository of the hub, fetched if need be.

    Raises:
        ConfigError: it is neither.
    """
    if Path(name).exists():
        return Path(name)
    remedy = "give the path of a folder, or a hub id"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConfigError(complain(f"no Medusa heads at {name!r}", "a folder or file", remedy))
    from huggingface_hub import snapshot_download

    wanted = [*_FILES, "config.json", CALIBRATION]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # it raises dozens of kinds
        raise ConfigError(
            complain(
                f"no Medusa heads at {name!r} ({type(error).__name__}: {error})",
                "a folder, a file, or a repository on the hub",
                remedy,
            )
        ) from error


def save_heads(heads: MedusaHeads, folder: Path, **config: Any) -> None:
    """Writes FasterDecoding's layout in bfloat16, with a config.json that vLLM
    reads too (but for tied heads, which vLLM does not know).

    Args:
        heads: to write.
        folder: made if need be.
        config: further keys of ``config.json``.
    """
    from safetensors.torch import save_file

    shape = heads.shape
    weights: dict[str, Tensor] = {}
    blocks: Any = heads.blocks
    for k, layers in enumerate(blocks):
        for n, layer in enumerate(layers):
            for name, value in layer.named_parameters():
                weights[f"{k}.{n}.linear.{name}"] = value
    for k, lm_head in enumerate(heads.lm_heads):
        weights[f"{k}.{shape.layers}.weight"] = lm_head.weight  # type: ignore[assignment]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.detach().to("cpu", torch.bfloat16) for k, v in weights.items()}, folder / _FILES[0]
    )
    written = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "medusa_num_heads": shape.heads,
        "medusa_num_layers": shape.layers,
        "medusa_fc_bias": shape.bias,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "tie_lm_head": not shape.lm_heads,
        **({"original_lm_head": True} if shape.lm_heads == 1 < shape.heads else {}),
        **config,
    }
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def _weights_file(folder: Path) -> Path:
    if folder.is_file():
        return folder
    for name in _FILES:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        complain(f"no Medusa heads in {folder}", f"one of {', '.join(_FILES)}", "check the path")
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty if there is no file.

    Raises:
        ConfigError: it holds something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise ConfigError(
            complain(f"{path} ({error})", "a JSON object", "mend or remove it")
        ) from error
    return found


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        # Never unpickles code: a checkpoint of the hub is foreign data.
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except Exception as error:  # pickle and safetensors raise their own kinds
        raise ConfigError(
            complain(
                f"Medusa heads {path} cannot be read ({error})",
                "a file of tensors by name",
                "fetch it again, or convert it to safetensors",
            )
        ) from error
    return found


def _sort(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same tensors under our module's names."""
    found: dict[str, Tensor] = {}
    for original, value in weights.items():
        name = _PREFIX.sub("", original)
        if block := _BLOCK.match(name):
            k, n = (block[1], block[2]) if block[1] else (block[3], block[4])
            found[f"blocks.{k}.{n}.{block[5]}"] = value
        elif lm_head := _LM_HEAD.match(name):
            k = lm_head[1] or lm_head[2] or "0"
            found[f"lm_heads.{k}.weight"] = value
        elif name == "token_map":
            found[name] = value
    if "blocks.0.0.weight" not in found:
        raise ConfigError(
            complain(
                f"{path} with {', '.join(sorted(weights)[:4]) or 'nothing'} ...",
                "0.0.linear.weight or blocks.0.layers.0.weight",
                "name the Medusa heads and not the model they belong to",
            )
        )
    return found


def _shape(
    found: dict[str, Tensor], config: Mapping[str, Any], path: Path, vocab_size: int
) -> tuple[HeadShape, Tensor | None]:
    """The shape, from the names; drops L_k that one for all stands in for."""
    token_map = found.pop("token_map", None)
    places = {tuple(map(int, n.split(".")[1:3])) for n in found if n[0] == "b"}
    heads, layers = (max(one) + 1 for one in zip(*places))
    own = sorted(name for name in found if name.startswith("lm_heads."))
    if config.get("original_lm_head"):
        own = own[:1]
    # Where the target's lm_head serves, one that lies in the file does not.
    if config.get("tie_lm_head"):
        own = []
    for name in [n for n in found if n.startswith("lm_heads.") and n not in own]:
        del found[name]
    if not own and not config.get("tie_lm_head"):
        raise ConfigError(
            complain(
                f"Medusa heads {path} without lm_heads",
                f"{heads} of them, or one and original_lm_head in config.json, or tie_lm_head",
                'add "tie_lm_head": true to config.json to use the target\'s',
            )
        )
    wanted = config.get("medusa_num_heads", config.get("num_heads", 0))
    if wanted > heads or len(own) not in {0, 1, heads}:
        raise ConfigError(
            complain(
                f"Medusa heads {path}: {heads} heads, {len(own)} lm_heads",
                f"{max(wanted, heads)} heads, each with an lm_head",
                "check that the file is complete and config.json belongs to it",
            )
        )
    first = found["blocks.0.0.weight"]
    rows = len(found[own[0]]) if own else int(config.get("vocab_size", vocab_size))
    if token_map is not None:
        rows = len(token_map)
        for name in own:
            if len(found[name]) > rows:
                found[name] = found[name][token_map]
    return HeadShape(
        heads=heads,
        layers=layers,
        hidden_size=int(first.shape[-1]),
        vocab_size=rows,
        lm_heads=len(own),
        bias="blocks.0.0.bias" in found,
        logit_scale=float(config.get("logit_scale", 1.0)),
    ), token_map


def _tokens(shape: HeadShape, token_map: Tensor | None, config: Mapping[str, Any]) -> int:
    """Size of the vocabulary that the heads speak of, 0 if nothing says."""
    if token_map is None:
        return shape.vocab_size
    return int(config.get("vocab_size", 0))
