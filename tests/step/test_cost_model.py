"""What steps cost is found out from noisy measurements."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_specplugin.step.cost_model import StepShape, StepTimeModel


def shape(requests, nodes, attended=0.0, masked=0):
    return StepShape(requests=requests, nodes=nodes, attended=attended, masked=masked)


def truth(requests, nodes, attended=0.0):
    """30 ms, 1 ms a row, dearer from 32 rows on, 0.4 ms per 1000 attended."""
    rows = requests + nodes
    return 0.030 + 0.001 * rows + 0.001 * max(0, rows - 32) + 0.0004 * attended


def taught(steps=400, *, noise=0.08, spikes=0.0, graphs=(), law=truth, seed=0):
    rng = np.random.default_rng(seed)
    model = StepTimeModel(graphs)
    for _ in range(steps):
        requests, nodes = int(rng.integers(1, 17)), int(rng.integers(0, 60))
        attended = (requests + nodes) * rng.random() * 4
        seconds = law(requests, nodes, attended) * rng.lognormal(0, noise)
        if rng.random() < spikes:
            seconds *= 20
        model.observe(shape(requests, nodes, attended), seconds, 0.001)
    return model


@pytest.mark.parametrize("spikes", [0.0, 0.08])
def test_the_price_of_nodes_is_learnt_in_spite_of_noise(spikes):
    model = taught(spikes=spikes)
    assert model.ready
    for requests, nodes in [(1, 0), (1, 16), (8, 8), (8, 56)]:
        predicted = float(model.seconds(shape(requests, nodes))[0]) - 0.001
        allowed = 0.15 if spikes else 0.08
        assert predicted == pytest.approx(truth(requests, nodes), rel=allowed)
    assert 0.03 < model.error < (0.35 if spikes else 0.12)


def test_context_is_priced():
    assert taught(800).per_attended() == pytest.approx(0.0004, rel=0.5)


def test_a_step_never_gets_cheaper_by_a_node():
    model = taught(20, noise=0.5)
    assert (np.diff(model.seconds(shape(2, np.arange(60)))) >= 0).all()


def test_padded_sizes_make_stairs():
    sizes = (1, 2, 4, 8, 16, 32, 64, 128)

    def padded(requests, nodes, attended):
        rows = next(s for s in sizes if s >= requests + nodes)
        return 0.01 + 0.001 * rows

    model = taught(600, graphs=sizes, law=padded, noise=0.03)
    seconds = model.seconds(shape(1, np.arange(64))) - 0.001
    assert seconds[8] == seconds[15] < seconds[16] == seconds[31]
    assert float(seconds[20]) == pytest.approx(0.042, rel=0.1)


def test_a_machine_that_changes_is_followed():
    model = taught(300)
    rng = np.random.default_rng(5)
    for _ in range(1500):
        nodes = int(rng.integers(0, 40))
        model.observe(shape(4, nodes), 0.02 + 0.004 * nodes, 0.001)
    assert float(model.seconds(shape(4, 30))[0]) == pytest.approx(0.141, rel=0.15)


def test_before_anything_is_known_a_token_is_presumed_cheap():
    model = StepTimeModel()
    assert not model.ready
    relative = model.seconds(shape(1, np.array([0, 10])))
    assert 1.0 < relative[1] / relative[0] < 1.3


def test_nonsense_is_left_out():
    model = taught()
    before = model.seconds(shape(4, 4))
    for seconds in (0.0, -1.0, float("nan"), float("inf")):
        model.observe(shape(4, 4), seconds, 0.001)
    assert np.array_equal(model.seconds(shape(4, 4)), before)


def test_a_restart_starts_warm(tmp_path):
    model, path = taught(), tmp_path / "deep" / "times.json"
    assert not StepTimeModel().load(path)
    model.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["times.json"]
    warm = StepTimeModel()
    assert warm.load(path) and warm.ready and warm.largest == model.largest
    for nodes in (0, 10, 50):
        expected = float(model.seconds(shape(4, nodes))[0])
        assert float(warm.seconds(shape(4, nodes))[0]) == pytest.approx(expected)
    # Old evidence gives way to new.
    for _ in range(300):
        warm.observe(shape(4, 10), 0.2, 0.001)
    assert float(warm.seconds(shape(4, 10))[0]) > 0.12


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema": 99}', "null"])
def test_a_damaged_file_is_left_out(tmp_path, caplog, text):
    path = tmp_path / "times.json"
    path.write_text(text)
    model = StepTimeModel()
    assert not model.load(path)
    assert not model.ready
    assert "measured anew" in caplog.text


def test_a_file_with_numbers_that_are_none_is_left_out(tmp_path):
    path = tmp_path / "times.json"
    taught().save(path)
    state = json.loads(path.read_text())
    state["step"]["information"][0][0] = float("nan")
    path.write_text(json.dumps(state))
    assert not StepTimeModel().load(path)
