"""Traces hold what happened; replaying one tells what another policy would do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from vllm_specplugin import DraftTree
from vllm_specplugin.api import ProposerBase
from vllm_specplugin.config import SpecConfig, build
from vllm_specplugin.errors import ConfigError
from vllm_specplugin.step.draft_request import DraftRequest
from vllm_specplugin.step.drafting import Drafter
from vllm_specplugin.step.trace import TraceError, TraceWriter, read_trace
from vllm_specplugin.telemetry.counters import SpecMetrics
from vllm_specplugin.testing import engine_info, step_outcome
from vllm_specplugin.testing import request as request_view
from vllm_specplugin.tools.replay.replay import load_recording, replay
from vllm_specplugin.tools.replay.tune import parse_load, parse_policy, replay_command

ENGINE = engine_info(vocab_size=500, max_model_len=999, max_nodes=8)
PROMPT = 10


def text(request: int, length: int) -> list[int]:
    return [int(x) for x in np.random.default_rng(request).integers(0, 500, length)]


class Guesser(ProposerBase):
    """Drafts the true text, wrong at every fifth position."""

    def propose(self, ctx):
        return [self._tree(r) for r in ctx.requests]

    def _tree(self, request):
        at = len(request.tokens)
        truth = text(int(request.req_id), 200)
        n = min(request.max_nodes, 8)
        tokens = [(truth[p] + 1) % 500 if p % 5 == 0 else truth[p] for p in range(at, at + n)]
        return DraftTree.chain(tokens, [0.75] * n)

    def release(self, req_ids):
        pass


def record(path, policy, options=None, *, requests=3, length=60, limit=5.0, greedy=True):
    """An engine in which a step takes 20 ms and 1 ms per row."""
    made = build(SpecConfig(policy=policy, options={"policy": options or {}}), "policy", ENGINE)
    drafter = Drafter(Guesser(None, ENGINE), made, SpecConfig(), ENGINE, SpecMetrics())
    drafter.trace = TraceWriter(path, limit, {"policy": policy}, ENGINE)
    at = dict.fromkeys(range(requests), PROMPT)
    trees: dict[int, DraftTree] = {}
    steps = 0
    while at:
        emitted = np.full((len(at), 9), -1)
        outcomes = []
        for i, (request, position) in enumerate(at.items()):
            tree, truth = trees.get(request), text(request, 200)
            nodes = [] if tree is None else tree.tokens.tolist()
            right = 0
            while right < len(nodes) and nodes[right] == truth[position + right]:
                right += 1
            emitted[i, : right + 1] = truth[position : position + right + 1]
            outcomes.append((str(request), position, len(nodes), right))
        names, positions, nodes, right = zip(*outcomes)
        rows = len(names) + sum(nodes)
        drafter.observe(
            step_outcome(
                nodes, right, 0.02 + 0.001 * rows, req_ids=names, num_tokens=positions,
                gap_seconds=0.001, draft_requests=drafter.draft_requests,
                draft_seconds=0.0001, sample_seconds=0.002,
            ),
            emitted,
        )  # fmt: skip
        steps += 1
        for name, _, _, accepted in outcomes:
            at[int(name)] += accepted + 1
        at = {r: p for r, p in at.items() if p < PROMPT + length}
        drafted = drafter.draft([request_at(r, p, greedy) for r, p in at.items()])
        trees = {r: tree for r, tree in zip(at, drafted) if len(tree)}
    drafter.trace.close()
    return steps


def request_at(request, position, greedy=True):
    return DraftRequest(
        view=request_view(
            str(request), [0] * position, num_prompt_tokens=PROMPT, max_nodes=8, max_depth=8,
            temperature=0.0 if greedy else 1.0, seed=0,
        )
    )  # fmt: skip


@pytest.fixture(scope="module")
def shadow(tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "shadow.gz"
    record(path, "shadow")
    return path


def test_a_trace_says_what_happened(tmp_path):
    path = tmp_path / "t.gz"
    steps = record(path, "fixed", {"nodes": 4})
    header, records = read_trace(path)
    assert header["engine"]["vocab_size"] == 500
    assert len(records) == steps
    emitted = sum(len(row[5]) for step in records for row in step["r"])
    assert emitted >= 3 * 60
    first, second = records[0], records[1]
    assert [row[3] for row in first["r"]] == [0, 0, 0] and "f" not in first
    for number, _, tokens, parents, estimates, kept in second["f"]:
        row = second["r"][number]
        assert len(tokens) == 4 == row[3] and parents == [-1, 0, 1, 2]
        assert estimates == [750] * 4 and kept == [0, 1, 2, 3]
        # The accepted tokens are the drafted ones, under the same disguise.
        assert row[5][: row[4]] == tokens[: row[4]]


def test_texts_cannot_be_read_from_it(tmp_path):
    record(tmp_path / "a.gz", "shadow")
    record(tmp_path / "b.gz", "shadow")
    tokens = [
        [t for step in read_trace(tmp_path / f"{name}.gz")[1]
         for row in step["r"] if row[0] == 0 for t in row[5]]
        for name in "ab"
    ]  # fmt: skip
    truth = text(0, 200)[PROMPT : PROMPT + 60]
    assert tokens[0] != tokens[1]
    assert tokens[0][:60] != truth and tokens[1][:60] != truth
    # Equal tokens stay equal.
    assert len(set(tokens[0][:60])) == len(set(truth))


@pytest.mark.parametrize("nodes", [1, 3, 8])
def test_a_replay_is_what_would_have_happened(shadow, tmp_path, nodes):
    path = tmp_path / "real.gz"
    steps = record(path, "fixed", {"nodes": nodes})
    real = read_trace(path)[1]
    recording = load_recording([shadow])
    imagined = replay(recording, "fixed", {"nodes": nodes}, noise=0.0)
    assert imagined.coverage == 1.0
    assert imagined.steps == steps
    drafted = [sum(row[3] for row in r["r"]) for r in real]
    # At the end the engine may draft beyond what the recording knows.
    assert imagined.nodes_by_step[:-3] == drafted[:-3]


def test_policies_are_compared_in_the_recorded_engine(shadow, tmp_path):
    sweep = tmp_path / "sweep.gz"
    record(sweep, "shadow", {"sweep": True}, requests=3, length=150)
    recording = load_recording([shadow])
    recording.times = load_recording([sweep]).times
    base = replay(recording, "shadow")
    best = replay(recording, "goodput")
    assert base.nodes == 0 and base.tokens == best.tokens
    assert best.tokens_per_s > 1.5 * base.tokens_per_s
    assert best.seconds < base.seconds


@pytest.mark.parametrize("greedy", [True, False])
def test_requests_that_sample_are_replayed_as_such(tmp_path, greedy):
    record(tmp_path / "t.gz", "shadow", greedy=greedy)
    texts = load_recording([tmp_path / "t.gz"]).texts
    assert [text.sampled for text in texts] == [not greedy] * 3


def test_the_load_may_change_by_step(shadow):
    result = replay(load_recording([shadow]), "fixed", load=[1, 1, 1, 3])
    assert result.live_by_step[:4] == [1, 1, 1, 3]


def test_a_trace_stops_at_its_limit(tmp_path, caplog):
    path = tmp_path / "t.gz"
    record(path, "fixed", length=150, limit=0.0005)
    assert path.stat().st_size < 40_000
    assert "reached its limit" in caplog.text
    assert read_trace(path)[1]


def test_a_trace_that_was_cut_off_is_read_up_to_there(shadow, tmp_path):
    cut = tmp_path / "cut.gz"
    cut.write_bytes(shadow.read_bytes()[: shadow.stat().st_size // 2])
    whole, part = read_trace(shadow)[1], read_trace(cut)[1]
    assert 0 < len(part) < len(whole) and part == whole[: len(part)]


def test_what_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(TraceError, match="No such file"):
        read_trace(path)
    path.write_text("hello")
    with pytest.raises(TraceError, match="a trace written with --spec-trace"):
        read_trace(path)
    path.write_bytes(gzip.compress(b'{"schema": 99}\n'))
    with pytest.raises(TraceError, match="schema 99: expected schema 1"):
        read_trace(path)
    path.write_bytes(gzip.compress(b'{"schema": 1, "engine": {"graph_sizes": []}}\n'))
    with pytest.raises(TraceError, match="no steps in"):
        load_recording([path])


def test_a_trace_that_cannot_be_written_stops_the_start(tmp_path):
    with pytest.raises(ConfigError, match="trace file"):
        TraceWriter(tmp_path / "no" / "t.gz", 1.0, {}, ENGINE)


def test_a_damaged_trace_is_read_in_part_or_refused(tmp_path):
    path, rng = tmp_path / "t.gz", np.random.default_rng(0)
    record(path, "fixed")
    packed = path.read_bytes()
    text = gzip.decompress(packed)
    refused = 0
    for i in range(120):
        whole = bytearray(text if i % 3 else packed)
        if i % 2:
            whole = whole[: int(rng.integers(len(whole)))]
        else:
            at = int(rng.integers(min(len(whole), 2000)))
            whole[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(gzip.compress(bytes(whole)) if i % 3 else bytes(whole))
        try:
            load_recording([path])
        except TraceError as error:
            refused += "To fix it" in str(error)
    assert 10 < refused < 110


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("steps", [0, 1, 45])
def test_a_disk_that_is_full_may_say_so_at_any_time(steps, caplog, monkeypatch):
    """Buffers are written late: the header, a later step or the end may fail."""
    flushed = gzip.GzipFile.flush
    seen = []

    def flush(self, *args):
        seen.append(1)
        if len(seen) > 1 or not steps:
            flushed(self, *args)

    monkeypatch.setattr(gzip.GzipFile, "flush", flush)
    engine = engine_info(vocab_size=9, max_model_len=9, max_num_seqs=1, max_nodes=4)
    writer = TraceWriter(Path("/dev/full"), 1.0, {}, engine)
    told = step_outcome([1], [0], 0.01)
    for _ in range(steps):
        writer.step(told, np.array([[1]]), {}, None)
    writer.close()
    writer.close()
    assert writer.failed
    assert caplog.text.count("ends here") == 1


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(gzip.GzipFile, "write", full)
    record(tmp_path / "t.gz", "fixed")
    assert caplog.text.count("no space left on device") == 1


def test_the_command_prints_a_table_and_draws(shadow, tmp_path, capsys):
    plot = tmp_path / "p.svg"
    policies = ['fixed:{"nodes": 2}', "goodput"]
    assert replay_command([shadow], policies, batch=2, seed=0, plot=plot) == 0
    shown = capsys.readouterr().out
    for policy in policies:
        line = next(x for x in shown.splitlines() if x.startswith(policy))
        assert "100%" in line
    assert plot.read_text().lstrip().startswith("<?xml")


def test_loads_on_the_command_line():
    assert parse_load("1*2,3*1,2") == [1, 1, 3, 2]
    for bad in ("", "0*3", "3*0", "a*2", "2*b"):
        with pytest.raises(ConfigError, match="write for example 1"):
            parse_load(bad)


def test_policies_on_the_command_line():
    assert parse_policy("goodput") == ("goodput", {})
    assert parse_policy('fixed:{"nodes": 3}') == ("fixed", {"nodes": 3})
    for bad in ("fixed:{", "fixed:3"):
        with pytest.raises(ConfigError, match="a name, or a name and JSON"):
            parse_policy(bad)
    json.dumps(parse_policy("goodput"))
