"""What requests may choose, and how a wrong choice is refused."""

from __future__ import annotations

import tracemalloc

import pytest

from vllm_specplugin import SCORERS, ConfigError
from vllm_specplugin.config import SpecConfig
from vllm_specplugin.scorers.typical import TypicalScorer
from vllm_specplugin.step.request_options import RequestOptions, RequestParser, cache_scope


def parse_request(values, config):
    return RequestParser(config).parse(values)


def choosable(config):
    return RequestParser(config).choosable


LOSSLESS = ["block", "exact", "rejection", "traversal"]
OPEN = SpecConfig(request_scorers=["typical", "relaxed", "rejection"])


def test_without_options_there_is_the_operators_default():
    assert parse_request(None, SpecConfig()) == RequestOptions("exact", None)
    assert parse_request({"use": 3, "other": "x"}, SpecConfig()).scorer == "exact"
    mine = SpecConfig(scorer="typical", options={"scorer": {"epsilon": 0.5}})
    assert parse_request({}, mine).settings == TypicalScorer.Config(epsilon=0.5)


def test_a_request_chooses_a_scorer_its_options_and_its_nodes():
    found = parse_request(
        {
            "spec_scorer": "typical",
            "spec_epsilon": 0.2,
            "spec_delta": 1,
            "spec_max_nodes": 0,
            "spec_min_nodes": 0,
        },
        OPEN,
    )
    settings = TypicalScorer.Config(epsilon=0.2, delta=1.0)
    assert found == RequestOptions("typical", settings, 0, 0)
    assert isinstance(found.settings.delta, float)


def test_options_override_the_operators():
    mine = SpecConfig(scorer="typical", options={"scorer": {"epsilon": 0.5, "delta": 0.7}})
    found = parse_request({"spec_epsilon": 0.1}, mine).settings
    assert (found.epsilon, found.delta) == (0.1, 0.7)
    # Another scorer's options are not the operator's.
    assert parse_request({"spec_scorer": "exact"}, mine).settings is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"spec_scorer": "typicl"}, r"spec_scorer='typicl': expected one of exact, r"),
        ({"spec_scorer": "fly"}, "request_scorers"),
        ({"spec_scorer": 3}, "spec_scorer=3: expected one of"),
        ({"spec_scorer": ["typical"]}, "expected one of"),
        ({"spec_scorer": "os:system"}, "expected one of"),
        ({"spec_epsilon": 0.1}, r"no option spec_epsilon with spec_scorer='exact'"),
        ({"spec_scorer": "typical", "spec_epsilonn": 1}, "only spec_scorer, spec_max"),
        ({"spec_scorer": "typical", "spec_epsilon": 2}, "spec_epsilon=2.0: expected a"),
        ({"spec_scorer": "typical", "spec_epsilon": "a"}, "a value of type float"),
        ({"spec_scorer": "typical", "spec_epsilon": float("nan")}, "=nan: expected"),
        ({"spec_scorer": "typical", "spec_relax_run": -1}, "spec_relax_run=-1"),
        ({"spec_scorer": "typical", "spec_relax_run": 1.5}, "a value of type int"),
        ({"spec_scorer": "relaxed", "spec_begin": 5}, "both thinking markers or none"),
        ({"spec_max_nodes": 65}, "spec_max_nodes=65: expected an integer from 0 to 64"),
        ({"spec_max_nodes": True}, "spec_max_nodes=True"),
        ({"spec_min_nodes": -1}, "spec_min_nodes=-1"),
        ({"spec_min_nodes": "3"}, "spec_min_nodes='3'"),
        ({"spec_min_nodes": 5, "spec_max_nodes": 4}, "not above the maximum"),
        ({"spec_": 1}, "no option spec_ with"),
        ({"spec_cache_scope": 3}, "spec_cache_scope=3: expected a string of at most"),
        ({"spec_cache_scope": "a" * 257}, "256 characters"),
    ],
)
def test_wrong_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_request(values, OPEN)
    assert ": expected " in str(caught.value)
    assert "To fix it:" in str(caught.value)


def test_by_default_requests_may_choose_what_is_lossless():
    assert choosable(SpecConfig()) == LOSSLESS
    assert choosable(SpecConfig(scorer="fly")) == sorted([*LOSSLESS, "fly"])
    assert choosable(SpecConfig(request_scorers=[])) == ["exact"]
    assert choosable(OPEN) == ["exact", "rejection", "relaxed", "typical"]


def test_classes_may_read_keys_of_their_own(monkeypatch):
    monkeypatch.setattr(TypicalScorer, "request_options", ("colour",), raising=False)
    values = {"spec_scorer": "typical", "spec_colour": "red"}
    assert parse_request(values, OPEN).settings == TypicalScorer.Config()


@pytest.mark.parametrize("names", ["typical", [3], {"a": 1}])
def test_the_operators_list_is_checked(names):
    with pytest.raises(ConfigError, match="request_scorers"):
        SpecConfig.from_dict({"request_scorers": names})
    with pytest.raises(ConfigError, match="scorer 'nope'"):
        SpecConfig.from_dict({"request_scorers": ["nope"]})


def test_first_lines_say_what_a_rule_does_to_the_law():
    import sys

    for name in SCORERS.names():
        factory = SCORERS.get(name)
        first = (sys.modules[factory.__module__].__doc__ or "").splitlines()[0]
        assert ("(lossless" in first) == bool(factory.lossless)
        assert ("(lossy)" in first) == (not factory.lossless)


def test_requests_do_not_look_at_installed_packages(monkeypatch):
    """It takes milliseconds, and requests come by the thousand."""
    parser = RequestParser(OPEN)
    parser.parse({"spec_scorer": "typical"})
    monkeypatch.setattr(SCORERS, "_entry_points", lambda: pytest.fail("looked"))
    for values in ({}, {"spec_scorer": "typical"}, {"spec_scorer": "rejection"}):
        parser.parse(values)


BIG = 10**6
HOSTILE = {
    "huge integer": 10**5000,
    "negative huge integer": -(10**5000),
    "64 bits": 2**64,
    "infinite": float("inf"),
    "not a number": float("nan"),
    "number as a string": "1",
    "ten megabytes": "a" * (10 * BIG),
    "nested": {"a": [{"b": [[[[1]]]]}]},
    "long list": list(range(BIG)),
    "null": None,
    "dotted path": "os.path:join",
    "our class": "vllm_specplugin.scorers.typical:TypicalScorer",
    "file": "file:///etc/passwd",
    "parent": "../../etc/passwd",
    "bytes": b"x" * BIG,
    "object": object(),
    "true": True,
}


def outcome(parser, values):
    try:
        return parser.parse(values), ""
    except ConfigError as error:
        return None, str(error)


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_are_refused_in_few_words(value):
    """Or taken, where they are a legal value: never anything but that."""
    everything = SpecConfig(request_scorers=list(SCORERS.names()))
    parser = RequestParser(everything)
    keys = {"scorer", "max_nodes", "min_nodes", "cache_scope"}
    for scorer in SCORERS.names():
        options = getattr(SCORERS.get(scorer), "Config", None)
        fields = set(getattr(options, "__dataclass_fields__", ()))
        for key in keys | fields:
            values = {"spec_scorer": scorer, f"spec_{key}": value}
            tracemalloc.start()
            found, message = outcome(parser, values)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert len(message) < 700
            legal = value is None or key == "cache_scope"
            assert message or legal or 0 <= getattr(found.settings, key) <= 2**31
            assert peak < 2 * BIG


def test_hostile_keys_are_refused_in_few_words():
    for values in (
        {f"spec_{i}": 1 for i in range(BIG // 10)},
        {"spec_" + "a" * BIG: 1},
        {"spec_scorer": "typical", "spec___class__": "os:system"},
        {"spec_proposer": "os:system"},
        {"spec_trace": "/tmp/x"},
        {"spec_model": "/etc/passwd"},
    ):
        with pytest.raises(ConfigError, match="no option spec_") as caught:
            parse_request(values, OPEN)
        assert len(str(caught.value)) < 1500


def test_requests_stay_within_the_operators_limits():
    mine = SpecConfig(scorer="typical", request_limits={"relax_share": 0.2, "epsilon": 0.5})
    assert parse_request({"spec_relax_share": 0.2}, mine).settings.relax_share == 0.2
    message = r"spec_relax_share=0.3: expected at most 0.2, the operator's"
    with pytest.raises(ConfigError, match=message):
        parse_request({"spec_relax_share": 0.3}, mine)
    with pytest.raises(ConfigError, match="request_limits"):
        SpecConfig.from_dict({"request_limits": {"relax_share": "all"}})


def test_scopes_are_kept_apart_by_all_that_is_given():
    given = [
        (name, salt, tenant)
        for name in ("", "a", "b")
        for salt in (None, "a", "b")
        for tenant in (None, "a", "b")
    ]
    assert len({cache_scope(*one) for one in given}) == len(given)
    assert cache_scope("", None, None) == "" == cache_scope("", "", None)
    # What a worker is told cannot be named by another request.
    assert cache_scope(cache_scope("a", None, None), None, None) != cache_scope("a", None, None)


def test_an_operator_may_have_nothing_shared():
    mine = SpecConfig(cache_scope="request")
    assert parse_request({}, mine).scope is None
    assert parse_request({"spec_cache_scope": "a"}, mine).scope is None
    assert parse_request({"spec_cache_scope": "a"}, SpecConfig()).scope == "a"
    with pytest.raises(ConfigError, match="cache_scope='all': expected one of"):
        SpecConfig.from_dict({"cache_scope": "all"})
