"""``eagle``, ``eagle3`` and ``mtp`` with every row of the head compared to a fresh
prefill of target and head in plain torch; and a target with an MTP layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from spec_drafts import Checked
from torch import Tensor, nn

from examples.train_heads.eagle import EagleHead, EagleShape, Past, load_eagle, save_eagle
from vllm_specplugin.api import EngineInfo
from vllm_specplugin.proposers.eagle import EagleProposer
from vllm_specplugin.proposers.eagle3 import Eagle3Proposer
from vllm_specplugin.proposers.mtp import MtpProposer

TARGET = Path(__file__).parents[3] / "examples" / "models" / "target"


class _Reference:
    """Logits of a head at the end of a path: a prefill of the text, then a row for
    each token of the path."""

    def __init__(self, head: EagleHead) -> None:
        from transformers import LlamaForCausalLM

        self._head = head
        self._target = LlamaForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
        self._ends: dict[tuple[int, ...], tuple[Tensor, Tensor, Past]] = {}

    @torch.inference_mode()
    def __call__(self, text: list[int], path: list[int]) -> Tensor:
        if len(self._ends) > 300:
            self._ends.clear()
        read, _, _ = self._end(text, path)
        logits: Tensor = self._target.lm_head(read[0, -1])
        return logits

    def _end(self, text: list[int], path: list[int]) -> tuple[Tensor, Tensor, Past]:
        key = (len(text), *text, *path)
        if key not in self._ends:
            self._ends[key] = self._step(text, path) if path else self._prefill(text)
        return self._ends[key]

    def _embed(self, tokens: list[int]) -> Tensor:
        found: Tensor = self._target.get_input_embeddings()(torch.tensor([tokens]))
        return found

    def _prefill(self, text: list[int]) -> tuple[Tensor, Tensor, Past]:
        target, head = self._target, self._head
        raw: list[Tensor] = []
        hook = target.base_model.norm.register_forward_pre_hook(lambda _, read: raw.append(read[0]))
        found = target.base_model(torch.tensor([text]), output_hidden_states=True)
        hook.remove()
        states = raw[0] if isinstance(head, _MtpLayer) else found.last_hidden_state
        if layers := head.shape.layers:
            states = torch.cat([found.hidden_states[i] for i in layers], -1)
        rows = torch.arange(len(text) - 1)
        mask = rows[None] <= rows[:, None]
        features = head.features(states[:, :-1])
        end: tuple[Tensor, Tensor, Past] = head(self._embed(text[1:]), features, rows, mask)
        return end

    def _step(self, text: list[int], path: list[int]) -> tuple[Tensor, Tensor, Past]:
        _, out, past = self._end(text, path[:-1])
        here = len(text) + len(path) - 2
        every = torch.ones(1, here + 1, dtype=torch.bool)
        end: tuple[Tensor, Tensor, Past] = self._head(
            self._embed(path[-1:]), out[:, -1:], torch.tensor([here]), every, past
        )
        return end


class CheckedEagle(Checked, EagleProposer):
    def __init__(self, config: Any, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        self.reference = _Reference(load_eagle(Path(config.model)))


class CheckedEagle3(Checked, Eagle3Proposer):
    def __init__(self, config: Any, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        self.reference = _Reference(load_eagle(Path(config.model)))


class CheckedMtp(Checked, MtpProposer):
    def __init__(self, config: Any, engine: EngineInfo) -> None:
        super().__init__(config, engine)
        self.reference = _Reference(_MtpLayer.new())


class _MtpLayer(EagleHead):
    """MiMo's, around the same decoder layer. Its target norms hidden states only
    where it computes logits, so it reads them as they come."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__(shape)
        names = ("token", "hidden", "input", "final")
        self.norms = nn.ModuleDict(
            {name: nn.RMSNorm(shape.hidden_size, eps=shape.eps) for name in names}
        )

    @classmethod
    def new(cls) -> _MtpLayer:
        torch.manual_seed(5)
        head = cls(_shape()).requires_grad_(False)
        eye = torch.eye(head.shape.hidden_size)
        head.fc.weight.mul_(0.3).add_(0.5 * torch.cat([eye, eye], 1))
        return head

    def forward(
        self,
        embedded: Tensor,
        features: Tensor,
        positions: Tensor,
        mask: Tensor,
        past: Past | None = None,
    ) -> tuple[Tensor, Tensor, Past]:
        layer: Any = self.layers[0]
        norm = self.norms
        embedded = embedded.masked_fill(positions[:, None] == 0, 0.0)
        residual = self.fc(torch.cat([norm["hidden"](features), norm["token"](embedded)], -1))
        out, past = self._attend(layer.self_attn, norm["input"](residual), positions, mask, past)
        residual = residual + out
        out = residual + layer.mlp(layer.post_attention_layernorm(residual))
        out = norm["final"](out)
        return out, out, past

    def named(self) -> dict[str, Tensor]:
        """Weights by the names of MiMo's checkpoints."""
        own = self.layers[0].state_dict() | {
            "input_proj.weight": self.fc.weight,
            "token_layernorm.weight": self.norms["token"].weight,
            "hidden_layernorm.weight": self.norms["hidden"].weight,
            "input_layernorm.weight": self.norms["input"].weight,
            "final_layernorm.weight": self.norms["final"].weight,
        }
        return _with_biases({f"model.mtp_layers.0.{k}": v for k, v in own.items()})


def _shape(**changes: Any) -> EagleShape:
    config = json.loads((TARGET / "config.json").read_text())
    return EagleShape(
        hidden_size=config["hidden_size"],
        intermediate_size=changes.pop("intermediate_size", 704),
        heads=config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        positions=config["max_position_embeddings"],
        **changes,
    )


def _with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    biases = {
        f"{name.removesuffix('weight')}bias": torch.zeros(len(weight))
        for name, weight in weights.items()
        if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
    }
    return {name: w.detach().contiguous() for name, w in weights.items()} | biases


def mtp_target(folder: Path) -> None:
    """Writes the embedded target as a MiMo model with an MTP layer."""
    config = json.loads((TARGET / "config.json").read_text())
    config |= {
        "architectures": ["MiMoForCausalLM"],
        "model_type": "qwen2",
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
        "dtype": "float32",
    }
    weights = load_file(TARGET / "model.safetensors")
    weights = _with_biases({name: w.float() for name, w in weights.items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights | _MtpLayer.new().named(), folder / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((TARGET / name).read_bytes())


def random_head(folder: Path, **changes: Any) -> Path:
    """An untrained head; ``changes`` are those of its shape."""
    torch.manual_seed(3)
    save_eagle(EagleHead(_shape(**changes)), folder)
    return folder
