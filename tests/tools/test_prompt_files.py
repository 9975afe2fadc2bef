from __future__ import annotations

import pytest

from vllm_specplugin.tools.prompt_files import PromptFileError, read_prompts


def test_lines_and_json_lines(tmp_path):
    plain = tmp_path / "p.txt"
    plain.write_text("one\n\ntwo {\n")
    assert read_prompts(plain) == ["one", "two {"]
    lines = tmp_path / "p.jsonl"
    lines.write_text('"one"\n{"prompt": "two", "id": 3}\n')
    assert read_prompts(lines) == ["one", "two"]


def test_conversations_give_the_first_turn_of_the_user(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text(
        '{"question_id": 81, "category": "writing", "turns": ["first", "second"]}\n'
        '{"messages": [{"role": "system", "content": "s"},'
        ' {"role": "user", "content": "asked"}]}\n'
        '{"conversations": [{"from": "human", "value": "shared"},'
        ' {"from": "gpt", "value": "answer"}]}\n'
        '"a\u2028b"\n'
    )
    assert read_prompts(lines) == ["first", "asked", "shared", "a\u2028b"]
    sharegpt = tmp_path / "p.json"
    sharegpt.write_text(
        '[\n {"id": "x",\n  "conversations": [{"from": "human", "value": "one"}]},'
        '\n {"prompt": "two"}\n]\n'
    )
    assert read_prompts(sharegpt) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[\n"a",\n\n{"id": 1}]', r"p\.json:4: \{.*ShareGPT"),
        ('[\n"a",\n{"id": }]', r"p\.json:3: .*entry that begins in line 3"),
        ('[\n"a"\n"b"]', r"p\.json:3: .*expected a JSON list, here ','"),
        ('{"a": 1}', r"p\.json:1: .*here '\['.*\.jsonl"),
        ("[]", "is empty"),
        ('[{"conversations": [{"from": "gpt", "value": "x"}]}]', r"p\.json:1: "),
    ],
)
def test_a_bad_entry_of_a_list_has_its_line(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(PromptFileError, match=message):
        read_prompts(path)


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
