"""What the README shows is what there is."""

from __future__ import annotations

import re
from pathlib import Path

from vllm_specplugin import POLICIES, PROPOSERS, SCORERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_custom_proposer_is_the_example():
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
                 if "class RepeatLastLine" in b)  # fmt: skip
    example = (ROOT / "examples" / "custom_proposer.py").read_text()
    for line in block.splitlines():
        assert line in example


def test_every_name_is_described():
    for registry in (PROPOSERS, SCORERS, POLICIES):
        for name in registry.names():
            assert f"| `{name}` |" in README


def test_the_demos_output_is_there():
    assert "@@" not in README
    for variant in ("vllm ngram", "no drafts", "suffix tree"):
        assert variant in README
