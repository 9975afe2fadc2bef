"""What differs between the supported releases of vLLM, and is the same to us."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_specplugin import speculate
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.tools.ab import variants
from vllm_specplugin.vllm import worker
from vllm_specplugin.vllm.compat import versions
from vllm_specplugin.vllm.kv_cache import layout_probe
from vllm_specplugin.vllm.runner import counted_output, speculator, state
from vllm_specplugin.vllm.runner.speculator import TreeSpeculator

from .prompts import TARGET

SCHEDULE = "num_speculative_tokens_per_batch_size"


@pytest.mark.parametrize(
    ("top_k", "top_p"), [([9, 9], [1.0, 1.0]), ([9, 3], [1.0, 1.0]), ([9, 9], [0.5, 1.0])]
)
def test_limits_are_vllms(top_k: list[int], top_p: list[float]) -> None:
    """The first two of what its own function returns, in either release."""
    import inspect

    from vllm.v1.worker.gpu.sample.states import SamplingStates

    states: Any = SamplingStates.__new__(SamplingStates)
    states.vocab_size = 9
    for name, values in (("top_k", np.array(top_k)), ("top_p", np.array(top_p))):
        setattr(states, name, SimpleNamespace(np=values, gpu=torch.from_numpy(values)))
    slots_np = np.array([1, 0])
    slots = torch.from_numpy(slots_np)
    found = versions.limits(states, slots, slots_np)
    more = (9,) if "vocab_size" in inspect.signature(states.get_top_k_top_p).parameters else ()
    expected = states.get_top_k_top_p(slots, slots_np, *more)
    for ours, theirs in zip(found, expected):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)


@pytest.mark.parametrize("data_parallel_size", [1, 2])
def test_the_schedule_is_given_back(data_parallel_size: int) -> None:
    made = SimpleNamespace(
        parallel_config=SimpleNamespace(data_parallel_size=data_parallel_size),
        speculative_config=SimpleNamespace(**{SCHEDULE: None}),
    )
    versions.keep_schedule(made, {SCHEDULE: [[1, 1, 4]]})
    kept = [[1, 1, 4]] if data_parallel_size == 1 else None
    assert getattr(made.speculative_config, SCHEDULE) == kept
    versions.keep_schedule(SimpleNamespace(speculative_config=None), {})


@pytest.mark.parametrize("proposer", ["ngram", "token_recycling", "none"])
def test_the_engine_has_the_schedule(proposer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first runner vLLM 0.33 takes it away and pads new requests."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    load_general_plugins()
    arguments = speculate(proposer=proposer, max_nodes=4)
    made = EngineArgs(model=str(TARGET), enforce_eager=True, **arguments).create_engine_config()
    assert not made.use_v2_model_runner
    found = getattr(made.speculative_config, SCHEDULE)
    assert [list(one) for one in found] == arguments["speculative_config"][SCHEDULE]


@pytest.mark.parametrize(
    ("release", "there"), [("0.32.0", True), ("0.33.0+cpu", False), ("0.40.1", False), (None, True)]
)
@pytest.mark.parametrize("method", ["medusa", "mlp_speculator"])
def test_methods_that_vllm_dropped_are_not_offered(
    method: str, release: str | None, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "installed_version", lambda: release)
    if there:
        assert variants.parse_variant(f"vllm:{method}").kind == "vllm"
        return
    with pytest.raises(ConfigError, match="expected a method of the installed vLLM: ngram"):
        variants.parse_variant(f"vllm:{method}")


def layer(**more: Any) -> Any:
    impl = type("Impl", (layout_probe.TreeImpl,), {})()
    return SimpleNamespace(
        impl=impl, kv_cache=torch.zeros(1, 1, 2, 4), kv_sharing_target_layer_name=None, **more
    )


def test_layers_that_get_no_keys_verify_chains_only() -> None:
    assert layout_probe.why_no_trees(layer()) is None
    assert layout_probe.why_no_trees(layer(kv_cache_update_bypass=False)) is None
    reason = layout_probe.why_no_trees(layer(kv_cache_update_bypass=True))
    assert reason == "the model stores keys and values before it calls attention"


class Drafter:
    """As vLLM's."""

    def propose(self, *args: Any, **kwargs: Any) -> str:
        return "drafts"

    def sample_draft(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return kwargs


class Ours(TreeSpeculator, Drafter):
    def __init__(self, **parts: Any) -> None:
        self.shown: list[Any] = []

        def draft(step: Any, batch: Any, own: Any, hidden: Any) -> None:
            self.shown.append(own)

        self.spec_runner: Any = SimpleNamespace(
            spec=SimpleNamespace(parts=SimpleNamespace(**parts)),
            spec_path=SimpleNamespace(draft=draft, timing=nullcontext),
            spec_sampler=SimpleNamespace(
                sampling_states=SimpleNamespace(temperature=SimpleNamespace(np=np.zeros(2)))
            ),
        )


@pytest.mark.parametrize(
    ("said", "own"),
    [
        ({}, "drafts"),
        ({"num_speculative_tokens": 4}, "drafts"),
        ({"num_speculative_tokens": 0}, None),
    ],
)
def test_drafts_that_vllm_skipped_are_not_looked_at(
    said: dict[str, int], own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speculator, "step_of", lambda batch: object())
    one: Any = Ours(follows_native=True)
    one.propose(SimpleNamespace(idx_mapping_np=[1, 0]), None, None, "hidden", **said)
    assert one.shown == [own]


def test_the_counted_output_answers_all_that_vllm_asks() -> None:
    assert not getattr(counted_output.CountedOutput, "__abstractmethods__", None)


def test_what_vllm_adds_to_sampling_a_draft_is_passed_on() -> None:
    one: Any = Ours(couples_native=False)
    assert one.sample_draft(1, 2, 3, 4, 5, 6, None, num_steps=2) == {"num_steps": 2}


class Base:
    """As vLLM's worker: warming up may run steps of requests."""

    requests = 0
    model_runner: Any

    def compile_or_warm_up_model(self) -> str:
        for number in range(self.requests):
            self.model_runner.spec.requests.seeds[str(number)] = number
            self.model_runner.spec.requests.admitted += 1
        return "times"


class Worker(worker.SpecWorkerMixin, Base):
    pass


@pytest.mark.parametrize("requests", [0, 2])
def test_counters_start_afresh_after_vllms_warm_up(
    requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "warm_up", lambda runner: 0)
    monkeypatch.setattr(worker, "describe", str)
    built: list[Any] = []

    def build(config: Any, runner: Any, proposer: Any = None) -> Any:
        observer, drafter = SimpleNamespace(close=list), SimpleNamespace(trace=None)
        parts = SimpleNamespace(
            config=config, proposer=proposer or object(), observer=observer, drafter=drafter
        )
        built.append(parts)
        return parts

    monkeypatch.setattr(state.Parts, "build", build)
    one: Any = Worker.__new__(Worker)
    one.requests = requests
    restarted: list[bool] = []

    def restart(same_proposer: bool) -> None:
        restarted.append(same_proposer)

    path = SimpleNamespace(restart=restart)
    one.model_runner = SimpleNamespace(spec_path=path)
    one.model_runner.spec = spec = state.SpecState("config", None)  # type: ignore[arg-type]
    spec.chains_only = None
    assert one.compile_or_warm_up_model() == "times"
    assert restarted == [True] * bool(requests)
    assert len(built) == (2 if requests else 1)
    assert spec.parts is built[-1] and spec.parts.config == "config"
    assert spec.parts.proposer is built[0].proposer
    assert (spec.requests.seeds, spec.requests.admitted) == ({}, 0)
    assert spec.chains_only is None
