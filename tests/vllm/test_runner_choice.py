"""Which runner, scheduled how, and why."""

from __future__ import annotations

import pytest
import vllm.envs
import vllm.triton_utils

from vllm_specplugin import ConfigError, speculate
from vllm_specplugin.config import CONFIG_KEY
from vllm_specplugin.vllm.cpu_kernels.prepare import SECOND_RUNNER
from vllm_specplugin.vllm.frontend import runner_choice
from vllm_specplugin.vllm.frontend.args import DRAFTER

VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


@pytest.fixture(autouse=True)
def triton(monkeypatch):
    """As where Triton is installed; nothing else is asked for."""
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    monkeypatch.setattr(runner_choice, "_always_synchronous", lambda: False)
    monkeypatch.setenv(VARIABLE, "1")  # so that it is restored, whatever is set
    monkeypatch.delenv(VARIABLE)


def told(proposer, **options):
    made = speculate(proposer, **options)
    return made["speculative_config"], made.get("async_scheduling"), made


def test_host_side_proposers_are_scheduled_synchronously(caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, asynchronous, _ = told("suffix", max_nodes=9)
    assert method["method"] == "ngram_gpu"
    assert method["num_speculative_tokens"] == 9
    assert asynchronous is False
    (line,) = caplog.messages
    assert "synchronous scheduling, because proposer 'suffix' drafts on the h" in line


def test_a_platform_that_is_always_synchronous(monkeypatch, caplog):
    """vLLM's own for CPUs: requests may choose among scorers there."""
    monkeypatch.undo()
    assert runner_choice._always_synchronous()
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", True)
    with caplog.at_level("INFO", "vllm_specplugin"):
        _, asynchronous, made = told("token_recycling", policy="fixed")
    assert asynchronous is False
    assert made["additional_config"][CONFIG_KEY]["request_scorers"] != ("exact",)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("proposer", "own", "method", "nodes"),
    [
        ("none", {}, "ngram_gpu", 1),
        ("vllm:ngram", {"length": 3}, "ngram_gpu", 3),
        ("vllm:draft_model", {"model": "m"}, "draft_model", 4),
        ("vllm:eagle3", {"model": "m", "length": 2}, "eagle3", 2),
        ("vllm:mtp", {"length": 9}, "mtp", 5),
    ],
)
def test_vllms_drafters_keep_its_scheduling(proposer, own, method, nodes):
    told_method, asynchronous, _ = told(
        proposer, policy="fixed", options={"proposer": own, "policy": {"nodes": 5}}
    )
    assert told_method["method"] == method
    assert told_method["num_speculative_tokens"] == nodes
    assert asynchronous is None


@pytest.mark.parametrize(
    ("proposer", "own"), [("token_recycling", {}), ("medusa", {"model": "heads"})]
)
def test_device_side_proposers_keep_vllms_scheduling(proposer, own, caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, asynchronous, made = told(
            proposer, policy="fixed", max_nodes=9, options={"policy": {"nodes": 5}, "proposer": own}
        )
    assert method["method"] == "ngram_gpu"
    assert method["num_speculative_tokens"] == 5
    assert asynchronous is None
    assert made["additional_config"][CONFIG_KEY]["request_scorers"] == ("exact",)
    assert caplog.messages == []


@pytest.mark.parametrize(
    "policy",
    [{"policy": "goodput"}, {"policy": "fixed", "options": {"policy": {"step_nodes": 9}}}],
)
def test_policies_that_decide_step_by_step_do_so_a_step_ahead(policy, caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, asynchronous, _ = told("token_recycling", max_nodes=9, **policy)
    assert method["num_speculative_tokens"] == 9
    assert asynchronous is None
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("arguments", "because"),
    [
        ({"policy": "fixed", "scorer": "typical"}, "scorer 'typical' decides on"),
        ({"options": {"request_scorers": ["exact", "typical"]}}, "requests may choose typical"),
        ({"policy": "fixed", "options": {"trace": "t"}}, "a trace is written"),
    ],
)
def test_what_makes_device_side_proposers_synchronous(arguments, because, caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        _, asynchronous, _ = told("token_recycling", **arguments)
    assert asynchronous is False
    assert because in caplog.text


def test_a_model_run_level_by_level_goes_to_the_first_runner(caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, asynchronous, _ = told("draft_model", options={"proposer": {"model": "m"}})
    assert method["method"] == "draft_model"
    assert "driven" not in method
    assert asynchronous is False
    assert vllm.envs.VLLM_USE_V2_MODEL_RUNNER is False
    assert "vLLM's first model runner, because proposer 'draft_model'" in caplog.text


def test_it_is_refused_where_the_second_is_asked_for(monkeypatch):
    monkeypatch.setenv(VARIABLE, "1")
    with pytest.raises(ConfigError, match=f"'draft_model' with {VARIABLE}=1") as error:
        told("draft_model", options={"proposer": {"model": "m"}})
    assert "unset the variable" in str(error.value)


def test_what_vllm_keeps_on_its_first_runner_is_said(caplog):
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, _, _ = told("vllm:suffix")
    assert method["method"] == "suffix"
    assert "'vllm:suffix' is not on the second" in caplog.text
    assert vllm.envs.VLLM_USE_V2_MODEL_RUNNER is None  # vLLM sees it by itself


def test_vllms_drafters_stay_on_the_second_runner():
    method, asynchronous, _ = told("vllm:eagle3", options={"proposer": {"model": "m"}})
    assert method["method"] == "eagle3"
    assert asynchronous is None


@pytest.mark.parametrize("has_triton", [False, True])
def test_the_first_runner_is_kept_where_the_operator_keeps_it(has_triton, monkeypatch):
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", has_triton)
    monkeypatch.setenv(VARIABLE, "0")
    method, asynchronous, _ = told("token_recycling", policy="fixed")
    assert method["method"] == "custom_class"
    assert method["model"] == DRAFTER
    assert asynchronous is False


def test_a_cpu_without_triton_has_the_second_runner_too(monkeypatch, caplog):
    monkeypatch.setattr(vllm.triton_utils, "HAS_TRITON", False)
    monkeypatch.setattr(runner_choice, "_always_synchronous", lambda: True)
    with caplog.at_level("INFO", "vllm_specplugin"):
        method, asynchronous, made = told("suffix")
    assert method["method"] == "ngram_gpu"
    assert asynchronous is False
    assert made["additional_config"][SECOND_RUNNER] is True
    assert caplog.messages == [], "vLLM schedules synchronously on a CPU anyway"
    method, _, made = told("draft_model", options={"proposer": {"model": "m"}})
    assert method["method"] == "draft_model"
    assert SECOND_RUNNER not in made["additional_config"]
    assert vllm.envs.VLLM_USE_V2_MODEL_RUNNER is None  # other engines of the process


def test_asynchronous_scheduling_cannot_be_forced():
    from vllm_specplugin.vllm.frontend.args import engine_arguments

    with pytest.raises(ConfigError, match="asynchronous scheduling, but pro") as error:
        engine_arguments(
            proposer="suffix",
            scorer="exact",
            policy="fixed",
            max_nodes=4,
            options={},
            asynchronous=True,
        )
    assert "drop --async-scheduling" in str(error.value)


def test_synchronous_scheduling_can_be_asked_for():
    from vllm_specplugin.vllm.frontend.args import engine_arguments

    made = engine_arguments(
        proposer="token_recycling",
        scorer="exact",
        policy="fixed",
        max_nodes=4,
        options={},
        asynchronous=False,
    )
    assert made["async_scheduling"] is False
    assert made["additional_config"][CONFIG_KEY]["request_scorers"] is None
