"""What stops the engine at start, each with its remedy."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_specplugin import UnsupportedError
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.vllm.runner.async_step import DeviceSteps
from vllm_specplugin.vllm.runner.startup_checks import check_first, check_head, check_second
from vllm_specplugin.vllm.runner.tree_runner import TreeRunner, reads_drafts
from vllm_specplugin.vllm.runner.tree_support import chains_only_reason
from vllm_specplugin.vllm.worker import describe


def second(**changes):
    """A runner of which nothing is refused, but for ``changes``."""
    runner = SimpleNamespace(
        speculative_config=SimpleNamespace(
            enable_adaptive_verification=False, rejection_sample_method="standard"
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            prefill_context_parallel_size=1,
            decode_context_parallel_size=1,
            enable_batch_sharded_sampling=False,
            enable_dbo=False,
        ),
        model_config=SimpleNamespace(
            return_sampling_mask=False,
            enable_trace_replay=False,
            is_diffusion=False,
            uses_mrope=False,
        ),
        vllm_config=SimpleNamespace(watermark_config=None, kv_transfer_config=None),
        scheduler_config=SimpleNamespace(async_scheduling=False),
        compilation_config=SimpleNamespace(static_forward_context={}),
        kv_cache_config=SimpleNamespace(kv_cache_groups=[]),
    )
    for path, value in changes.items():
        part, _, name = path.partition("__")
        setattr(getattr(runner, part), name, value)
    return runner


def test_nothing_is_refused_without_reason():
    check_second(second())


@pytest.mark.parametrize(
    ("change", "value", "message", "remedy"),
    [
        (
            "speculative_config__enable_adaptive_verification",
            True,
            "adaptive verification together with the plugin's policy",
            "drop enable_adaptive_verification",
        ),
        (
            "speculative_config__rejection_sample_method",
            "block",
            "rejection_sample_method='block'",
            "choose --spec-scorer",
        ),
        (
            "parallel_config__pipeline_parallel_size",
            2,
            "pipeline parallelism on vLLM's second",
            "VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            "parallel_config__prefill_context_parallel_size",
            2,
            "prefill context parallelism",
            "switch it off",
        ),
        (
            "parallel_config__enable_batch_sharded_sampling",
            True,
            "batch-sharded sampling",
            "switch it off",
        ),
        ("vllm_config__watermark_config", object(), "watermarking", "switch it off"),
        ("model_config__return_sampling_mask", True, "return_sampling_mask", "switch it off"),
        ("model_config__enable_trace_replay", True, "trace replay", "switch it off"),
        ("model_config__is_diffusion", True, "a diffusion model", "switch it off"),
    ],
)
def test_each_refusal_names_what_and_how(change, value, message, remedy):
    with pytest.raises(UnsupportedError, match=message) as error:
        check_second(second(**{change: value}))
    assert remedy in str(error.value)


def test_the_first_runner_wants_synchronous_scheduling():
    check_first(SimpleNamespace(use_async_scheduling=False))
    with pytest.raises(UnsupportedError, match="asynchronous scheduling"):
        check_first(SimpleNamespace(use_async_scheduling=True))


def with_head(method, **head):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(
            method=method,
            model="head",
            draft_model_config=SimpleNamespace(
                hf_config=SimpleNamespace(**{"hidden_size": 8, "vocab_size": 30} | head)
            ),
        ),
        model_config=SimpleNamespace(
            model="target", get_hidden_size=lambda: 8, get_vocab_size=lambda: 30
        ),
    )


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_a_head_of_another_target_is_refused(method):
    check_head(with_head(method))
    check_head(SimpleNamespace(speculative_config=None))
    check_head(with_head("draft_model", hidden_size=4))
    for wrong, message in (
        ({"hidden_size": 4}, "with hidden size 4: expected hidden size 8"),
        ({"vocab_size": 31}, "with vocabulary 31: expected vocabulary 30"),
    ):
        with pytest.raises(UnsupportedError, match=f"{method} head.*{message}"):
            check_head(with_head(method, **wrong))
    # EAGLE-3 heads may be of another width than the target.
    narrow = with_head("eagle3", hidden_size=4, target_hidden_size=8)
    check_head(narrow)


@pytest.mark.parametrize(
    ("proposer", "scorer"), [("suffix", "exact"), ("token_recycling", "typical")]
)
def test_asynchronous_scheduling_wants_the_device(proposer, scorer):
    class Offers:
        def on_device(self, nodes, device):
            raise AssertionError("not asked")

    runner = SimpleNamespace(
        device=torch.device("cpu"),
        max_num_reqs=1,
        num_speculative_steps=2,
    )
    parts = SimpleNamespace(
        proposer=object() if proposer == "suffix" else Offers(),
        config=SpecConfig(proposer=proposer, scorer=scorer),
    )
    runner.spec = SimpleNamespace(parts=parts)
    with pytest.raises(UnsupportedError, match="asynchronous scheduling with") as error:
        DeviceSteps(runner)
    assert "without --async-scheduling" in str(error.value)


@pytest.mark.parametrize(
    ("change", "value", "reason"),
    [
        ("parallel_config__pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config__decode_context_parallel_size", 2, "decode context"),
        ("parallel_config__enable_dbo", True, "dual-batch overlap"),
        ("model_config__uses_mrope", True, "multimodal rotary"),
        ("vllm_config__kv_transfer_config", object(), "KV transfer"),
        ("compilation_config__static_forward_context", {}, "no attention layers"),
    ],
)
def test_chains_only_says_why(change, value, reason):
    assert reason in chains_only_reason(second(**{change: value}), frozenset())


@pytest.mark.parametrize("recurrent", [True, False])
def test_layers_that_are_not_plain_attention_mean_chains(recurrent):
    layer = SimpleNamespace() if recurrent else SimpleNamespace(impl=object())
    runner = second(compilation_config__static_forward_context={"a": layer})
    runner.kv_cache_config.kv_cache_groups = [SimpleNamespace(layer_names=["a"])]
    expected = "not attention (a)" if recurrent else "implementation is object (a)"
    assert expected in chains_only_reason(runner, frozenset())
    assert "no attention layers" in chains_only_reason(runner, frozenset({"a"}))


def test_what_reads_drafts_as_a_list():
    plain = {
        "structured_outputs": None,
        "repetition_penalty": 1.0,
        "frequency_penalty": 0.0,
        "presence_penalty": 0.0,
        "bad_words": None,
        "thinking_token_budget": None,
    }
    assert not reads_drafts(SimpleNamespace(**plain))
    for name, value in (
        ("structured_outputs", object()),
        ("repetition_penalty", 1.1),
        ("frequency_penalty", 0.1),
        ("presence_penalty", -0.1),
        ("bad_words", ["a"]),
        ("thinking_token_budget", 9),
    ):
        assert reads_drafts(SimpleNamespace(**{**plain, name: value})), name


@pytest.mark.parametrize(
    ("native", "processors", "reason"),
    [(True, 3, "vLLM's drafter reads"), (False, 4, "custom logits processors")],
)
def test_chains_on_the_second_runner_alone(native, processors, reason):
    runner = TreeRunner()
    runner.spec = SimpleNamespace(parts=SimpleNamespace(follows_native=native))
    runner.sampler = SimpleNamespace(logits_processors=[None] * processors)
    assert reason in runner._chains_only_reason()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_start_up_line_names_runner_and_scheduling(asynchronous):
    runner = second()
    runner.scheduler_config = SimpleNamespace(async_scheduling=asynchronous)
    runner.spec = SimpleNamespace(
        chains_only="it uses ALiBi",
        parts=SimpleNamespace(
            engine=SimpleNamespace(max_nodes=6),
            config=SimpleNamespace(proposer="p", scorer="exact", policy="fixed"),
        ),
    )
    line = describe(runner)
    assert "is active on SimpleNamespace of vLLM" in line
    assert f"scheduling={'asynchronous' if asynchronous else 'synchronous'} (" in line
    assert "draft chains only, because it uses ALiBi" in line
