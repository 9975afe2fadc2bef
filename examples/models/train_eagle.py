"""Trains an EAGLE head (2401.15077) for the target: one layer on its features.

    python examples/models/prepare_data.py
    python examples/models/train_eagle.py /tmp/eagle

Let ``h_t`` be the target's last hidden state and ``e`` its embedding. The head
computes, with one decoder layer that has no norm in front::

    f_t = layer(fc([e(x_(t+1)); h_t])),   q_t = softmax(lm_head(f_t))

and ``q_t`` guesses the token at ``t + 2``, ``f_t`` the target's ``h_(t+1)``: for
later tokens of a draft it stands in for it. So two passes are trained, the second
on the first one's features::

    loss = sum_passes KL(p_(t+1) || q_t) + |f_t - h_(t+1)|
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
)

from vllm_specplugin.heads.target import Target, load_target, read_tokens
from vllm_specplugin.heads.train import TrainSettings, _batches

HERE = Path(__file__).parent


class EagleHead(nn.Module):
    """The layout that vLLM's ``EagleLlamaForCausalLM`` loads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        layer: Any = self.layers[0]
        layer.input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """``[batch, length, hidden_size]`` each, and so is what comes out."""
        x = self.fc(torch.cat([embedded, features], dim=-1))
        length = x.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        found: Tensor = self.layers[0](
            x,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.rotary(x, positions),
        )
        return found


def losses(
    target: Target, head: EagleHead, rows: Tensor
) -> tuple[Tensor, list[dict[str, float]]]:
    """The loss, and by pass how often the head agrees with the target."""
    with torch.no_grad():
        h = target.hidden(rows)
        embedded = target.model.get_input_embeddings()(rows[:, 1:])
        p = target.lm_head(h).log_softmax(-1)
    total, told = torch.zeros(()), []
    features = h[:, :-1]
    for step in range(2):
        f = head(embedded, features)
        seen = slice(step, -1)  # h_(t+1) is known but for the last
        q = target.lm_head(f[:, seen]).log_softmax(-1)
        wanted, after = p[:, 1 + step : -1], h[:, 1 + step : -1]
        overlap = torch.minimum(wanted.exp(), q.detach().exp()).sum(-1).mean()
        same = (wanted.argmax(-1) == q.argmax(-1)).float().mean()
        told.append({"same argmax": same.item(), "overlap": overlap.item()})
        kl = nn.functional.kl_div(q, wanted, log_target=True, reduction="none").sum(-1)
        gap = nn.functional.smooth_l1_loss(f[:, seen], after)
        total = total + kl.mean() + gap
        # The next pass reads at t what this one made of t - 1.
        features = torch.cat([features[:, :1], f[:, :-1]], dim=1)
    return total, told


def main() -> None:
    """Trains, reports and saves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--target", type=Path, default=HERE / "target")
    parser.add_argument("--data", type=Path, default=HERE, help="has train.npy")
    parser.add_argument("--tokens", type=float, default=5e5)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    args = parser.parse_args()
    settings = TrainSettings(tokens=args.tokens, learning_rate=args.learning_rate)
    target = load_target(str(args.target), "cpu")
    ids, held = (
        read_tokens(args.data / f"{n}.npy", str(args.target)) for n in ("train", "held")
    )
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(args.target)
    config.num_hidden_layers = 1
    config._attn_implementation = "eager"
    head = EagleHead(config)
    optimizer = torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=0)
    source = _batches(ids, settings, "cpu")
    with tqdm(total=settings.steps, unit="step", mininterval=10) as bar:
        for step, rows in zip(range(settings.steps), source):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(step)
            loss, told = losses(target, head, rows)
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(overlap=f"{told[0]['overlap']:.3f}", refresh=False)
            bar.update()
    save(head, config, args.output)
    rows = torch.from_numpy(held[: len(held) // 256 * 256].reshape(-1, 256)[::40])
    with torch.no_grad():
        _, told = losses(target, head.eval(), rows)
    for step, row in enumerate(told):
        print(f"pass {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))


def save(head: EagleHead, config: LlamaConfig, folder: Path) -> None:
    """Writes bfloat16 weights; embedding and lm_head are the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.to(torch.bfloat16).contiguous()
        for name, value in head.state_dict().items()
        if not name.startswith("rotary")
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
