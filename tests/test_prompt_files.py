from __future__ import annotations

import pytest

from vllm_specplugin.prompt_files import PromptFileError, read_prompts


def test_lines_and_json_lines(tmp_path):
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\ntwo {\n")
    assert read_prompts(plain) == ["one", "two {"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('"one"\n{"prompt": "two", "id": 3}\n')
    assert read_prompts(lines) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n{"prompt"\n', r"p\.jsonl:2: "),
        ('"a"\n\n{"text": "b"}\n', r"p\.jsonl:3: .*expected a string, or an object"),
        ("3\n", r"p\.jsonl:1: 3"),
        ("\n", "is empty"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_text(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompts(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PromptFileError, match="nowhere"):
        read_prompts(tmp_path / "nowhere")
