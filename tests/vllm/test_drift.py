"""What we rely on in the installed vLLM."""

from __future__ import annotations

import pytest

from vllm_specplugin import UnsupportedError
from vllm_specplugin.vllm.compat import seams


def test_the_installed_vllm_is_as_expected():
    assert seams.drift() == []


def test_a_change_is_named(monkeypatch):
    monkeypatch.setattr(
        seams,
        "SEAMS",
        {
            "vllm.v1.outputs:SamplerOutput": ("sampled_token_ids", "logits"),
            "vllm.v1.outputs:NoSuchThing": None,
            "vllm.v1.sample.sampler:Sampler.compute_logprobs": ("x",),
        },
    )
    changed, gone, renamed = seams.drift()
    assert "SamplerOutput takes" in changed
    assert "expected ('sampled_token_ids', 'logits')" in changed
    assert "NoSuchThing is gone" in gone
    assert "compute_logprobs takes" in renamed


@pytest.mark.parametrize("found", ["0.31.4", "0.33.0", None])
def test_other_versions_stop_with_the_supported_ones(monkeypatch, found):
    monkeypatch.setattr(seams, "installed_version", lambda: found)
    with pytest.raises(UnsupportedError, match=r"expected vLLM 0\.32\.x"):
        seams.check_version()


def test_patch_releases_are_fine(monkeypatch):
    monkeypatch.setattr(seams, "installed_version", lambda: "0.32.7")
    seams.check_version()
