from __future__ import annotations

import pytest

from vllm_specplugin.errors import ConfigError
from vllm_specplugin.tools.ab.variants import VLLM_METHODS, parse_variant, parse_variants


def test_baseline_and_its_engine():
    plain = parse_variant("baseline")
    assert (plain.kind, plain.engine, plain.speculate) == ("baseline", {}, None)
    own = parse_variant('baseline:{"engine": {"enforce_eager": true}}')
    assert own.engine == {"enforce_eager": True}
    assert plain.lossless and not plain.exact


def test_vllms_methods_get_what_they_need_and_what_is_asked():
    ngram = parse_variant('vllm:ngram:{"num_speculative_tokens": 3}')
    config = ngram.engine["speculative_config"]
    assert config == {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 5,
    }
    assert ngram.kind == "vllm" and ngram.lossless


def test_ours_with_defaults_and_options():
    ours = parse_variant('suffix:{"max_nodes": 8, "proposer": {"max_match": 8}}')
    assert ours.speculate == {
        "proposer": "suffix",
        "scorer": "exact",
        "policy": "goodput",
        "max_nodes": 8,
        "options": {"proposer": {"max_match": 8}},
    }
    assert ours.exact and ours.lossless
    assert not parse_variant("suffix+typical+fixed").lossless
    rejection = parse_variant("ngram+rejection")
    assert rejection.lossless and not rejection.exact


def test_vllms_drafter_under_our_scorer_is_ours():
    both = parse_variant("vllm:ngram+exact")
    assert both.kind == "plugin"
    assert both.speculate["proposer"] == "vllm:ngram"


def test_a_name_in_front():
    assert parse_variant("short=suffix+exact").name == "short"
    assert parse_variant('ngram:{"max_nodes": 4}').name == "ngram"


def test_defaults_pairs_and_a_variant_beside_itself():
    assert [v.kind for v in parse_variants([])] == ["baseline", "vllm", "plugin"]
    assert [v.name for v in parse_variants(["suffix"])] == ["baseline", "suffix"]
    twice = parse_variants(["baseline", "baseline"])
    assert [v.name for v in twice] == ["baseline", "baseline #2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sufix", "variant 'sufix': proposer 'sufix': expected one of .*suffix"),
        ("suffix+exakt", "scorer 'exakt': expected one of .*exact"),
        ("suffix+exact+good", "policy 'good': expected one of .*goodput"),
        ("a+b+c+d", r"expected proposer\+scorer\+policy"),
        ("suffix+", r"expected proposer\+scorer\+policy"),
        ("vllm:nothing", "expected a method of the installed vLLM: ngram, .*add a scorer"),
        ("suffix:{oops}", "expected JSON behind the name"),
        ('suffix:{"max_nodes": 99}', "variant .*max_nodes=99: .*from 1 to 64"),
        ('suffix:{"proposer": {"no": 1}}', "variant .*no"),
        ('suffix:{"engine": 3}', "expected an object as 'engine'"),
        ('baseline:{"max_nodes": 4}', "expected no options but 'engine'"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_variant(text)


def test_the_description_is_plain_data():
    shown = parse_variant("suffix").describe()
    assert shown["lossless"] is True and shown["spec"] == "suffix"
    assert set(VLLM_METHODS) > {"ngram", "draft_model", "eagle3"}
