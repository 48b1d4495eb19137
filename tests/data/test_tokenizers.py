"""Tokenizers from the directory of a base model."""

import json

import pytest

from jax_ordermerge.data import tokenizers
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.errors import UserError


def test_a_tokenizer_that_needs_sentencepiece(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has only tokenizer\.model, which needs sentencepiece"):
        load_tokenizer(tmp_path)


def test_tokenizers(tmp_path, byte_tokenizer):
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole")("a").input_ids == byte_tokenizer()("a").input_ids
    with pytest.raises(UserError, match=r"tokenizer directory .*absent not found"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(tmp_path / "bare")
    assert "\n" not in str(caught.value)


def test_real_tokenizer_agrees_with_its_golden_cases(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    cases = json.loads(
        (shared_data / "golden" / "stories260K" / "tokenizer_cases.json").read_text()
    )
    for case in cases:
        assert tokenizer(case["text"]).input_ids == case["ids"]
