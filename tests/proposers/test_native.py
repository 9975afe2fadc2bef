"""``vllm:...``: chains from vLLM's own drafters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.proposers.test_text_proposers import view
from vllm_specplugin.api import ProposeContext
from vllm_specplugin.config import SpecConfig, build, resolve
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.noise.gumbel import gumbel
from vllm_specplugin.testing import FakeNativeDrafts, engine_info

VOCAB = 1000
ENGINE = engine_info(vocab_size=VOCAB)


def make(name="vllm:ngram", **options):
    config = SpecConfig(proposer=name, options={"proposer": options})
    return build(config, "proposer", ENGINE)


def draft(proposer, native):
    return proposer.propose(ProposeContext(requests=native.requests, native=native))


def asked(name, **options):
    config = SpecConfig(proposer=name, options={"proposer": options})
    factory, parsed = resolve(config, "proposer")
    return factory.speculative(parsed)


def test_chains_within_budget_and_depth():
    views = [view([1], "a", max_nodes=2), view([1], "b"), view([1], "c", max_depth=1)]
    native = FakeNativeDrafts(views, [5, 6, 7, 8, 9])
    trees = draft(make(length=4), native)
    assert native.asked == [4]
    assert [t.tokens.tolist() for t in trees] == [[5, 6], [5, 6, 7, 8], [5]]
    assert all(tree.is_chain for tree in trees)
    native = FakeNativeDrafts(views[:1], [5, 6, 7, 8])
    draft(make(length=4), native)
    assert native.asked == [2], "no more is asked for than anybody may draft"


def test_padding_ends_a_chain():
    [tree] = draft(make(), FakeNativeDrafts([view([1])], [5, -1, -1, -1]))
    assert tree.tokens.tolist() == [5]
    [tree] = draft(make(), FakeNativeDrafts([view([1])], [-1, -1, -1, -1]))
    assert len(tree) == 0


def test_probabilities_come_along_where_tokens_were_drawn():
    probs = torch.rand(2, 4, VOCAB)
    views = [view([1], "a", temperature=1.0, max_nodes=3), view([1], "b")]
    drawn, greedy = draft(make(), FakeNativeDrafts(views, [5, 6, 7, 8], probs))
    assert drawn.draft_probs is not None and greedy.draft_probs is None
    assert drawn.draft_probs.rows.tolist() == [0, 1, 2, -1]
    assert drawn.draft_probs.sampled.all()
    assert torch.equal(drawn.draft_probs.probs, probs[0])


def test_models_guess_with_the_noise_of_their_requests():
    """What a drafter with the target's own logits takes is what ``exact`` takes."""
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    views = [
        view([1] * 5, "a", temperature=0.7, seed=11),
        view([1] * 9, "b"),
        view([1], "c", temperature=1.3, seed=5, top_k=2),
    ]
    native = FakeNativeDrafts(views, [], logits=logits)
    trees = draft(make("vllm:draft_model", model="m", length=3), native)
    for row, (one, tree) in enumerate(zip(views, trees)):
        wanted = []
        for depth in range(3):
            scaled = logits[row].numpy().astype(np.float64)
            if one.top_k:
                scaled[scaled < np.sort(scaled)[-one.top_k]] = -np.inf
            if one.temperature:
                noise = gumbel(one.seed, len(one.tokens) + depth, np.arange(VOCAB))
                scaled = scaled / one.temperature + noise
            wanted.append(int(scaled.argmax()))
        assert tree.tokens.tolist() == wanted
        assert tree.draft_probs is None
    assert len(set(trees[0].tokens.tolist())) > 1, "the noise differs by position"


@pytest.mark.parametrize(
    ("name", "options", "steered"),
    [
        ("vllm:eagle", {}, True),
        ("vllm:eagle", {"coupling": "off"}, False),
        ("vllm:eagle", {"engine": {"draft_sample_method": "probabilistic"}}, False),
        ("vllm:ngram", {}, False),
    ],
)
def test_who_is_coupled(name, options, steered):
    model = {} if name == "vllm:ngram" else {"model": "m"}
    native = FakeNativeDrafts([view([1], temperature=1.0)], [3])
    draft(make(name, **model, **options), native)
    assert native.steered is steered
    native = FakeNativeDrafts([view([1])], [3])
    draft(make(name, **model, **options), native)
    assert not native.steered, "greedy requests need no noise"


def test_drawn_drafts_cannot_be_coupled():
    drawn = {"draft_sample_method": "probabilistic"}
    with pytest.raises(ConfigError, match=r"coupling='on'.*must not share the noise"):
        asked("vllm:eagle", model="m", coupling="on", engine=drawn)
    with pytest.raises(ConfigError, match=r"coupling='yes'.*auto, on, off"):
        asked("vllm:eagle", model="m", coupling="yes")
    with pytest.raises(ConfigError, match="vllm:ngram options has no 'coupling'"):
        asked("vllm:ngram", coupling="on")


def test_what_vllm_is_told():
    assert asked("vllm:ngram", length=3, engine={"prompt_lookup_max": 4}) == {
        "method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4
    }  # fmt: skip
    assert asked("vllm:eagle", model="org/head")["model"] == "org/head"
    with pytest.raises(ConfigError, match=r"vllm:eagle' with model ''.*hub id"):
        asked("vllm:eagle")
    with pytest.raises(ConfigError, match=r"vllm:ngram' with model 'x'.*leave"):
        asked("vllm:ngram", model="x")
