"""Prompts become token ids as the model was trained to see them: one BOS, no EOS, the template's keywords."""

from pathlib import Path
from typing import Any

import pytest

from common.config import Config, ConfigError, ModelConfig, TaskConfig
from common.tasks.rows import BadRow, RowError
from common.tasks.tokenizing import check_template, fingerprint, tokenizing
from common.types import Prompt
from tests.support.tokenizers import BOS, EOS, TEMPLATE, ids_of, write_tokenizer


def config_of(path: str, **keywords: Any) -> Config:
    return Config(model=ModelConfig(path=path), task=TaskConfig(name="file", chat_template_kwargs=keywords))


def text(content: str) -> Prompt:
    return Prompt(uid="u", text=content, reference="")


def chat(*turns: tuple[str, str]) -> Prompt:
    messages = tuple({"role": role, "content": content} for role, content in turns)
    return Prompt(uid="u", text="", reference="", messages=messages)


@pytest.mark.parametrize("prefix", ["", "<bos>"])
@pytest.mark.parametrize("suffix", ["", "<eos>"])
def test_a_text_begins_with_one_bos_at_most_and_never_ends_with_eos(tmp_path: Path, prefix: str, suffix: str) -> None:
    tokenize = tokenizing(config_of(write_tokenizer(tmp_path, prefix=prefix, suffix=suffix)))
    start, sum_ids = ([BOS] if prefix else []), ids_of("1+1")
    assert tokenize(text("1+1")) == start + sum_ids
    assert tokenize(text("<bos>1+1")) == [BOS, *sum_ids], "a text that has it and a tokenizer that adds it"
    assert tokenize(text("<bos><bos>1+1")) == [BOS, *sum_ids]
    assert tokenize(text("1+1<eos><eos>")) == start + sum_ids
    assert tokenize(text("1<eos>+1")) == [*start, *ids_of("1"), EOS, *ids_of("+1")], "within a prompt they are its own"


def test_a_conversation_goes_through_the_template_which_brings_its_own_bos(tmp_path: Path) -> None:
    tokenize = tokenizing(config_of(write_tokenizer(tmp_path, prefix="<bos>", suffix="<eos>", template=TEMPLATE)))
    assert tokenize(chat(("user", "1+1"))) == [BOS, *ids_of("user:1+1|assistant:")]


def test_keywords_reach_the_template(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, template=TEMPLATE)
    plain, thinking = tokenizing(config_of(path)), tokenizing(config_of(path, think=True))
    assert thinking(chat(("user", "1"))) == plain(chat(("user", "1"))) + ids_of("think")


def test_what_the_template_or_the_tokenizer_refuses_says_why(tmp_path: Path) -> None:
    tokenize = tokenizing(config_of(write_tokenizer(tmp_path, prefix="<bos>", template=TEMPLATE)))
    with pytest.raises(RowError, match=r"refuses it \(no system turn\)") as refused:
        tokenize(chat(("system", "1"), ("user", "2")))
    assert refused.value.reason is BadRow.UNRENDERABLE
    for prompt in (text("日本語"), text("<bos>"), text("<eos>")):
        with pytest.raises(RowError, match="has no tokens") as refused:
            tokenize(prompt)
        assert refused.value.reason is BadRow.NO_TOKENS


def test_a_conversation_needs_a_template_and_keywords_need_one_that_uses_them(tmp_path: Path) -> None:
    without, with_template = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", template=TEMPLATE)

    def refusal(config: Config, *prompts: Prompt) -> str:
        with pytest.raises(ConfigError) as caught:
            check_template(config, prompts, lambda prompt: "train.jsonl, line 1")
        return str(caught.value)

    assert "train.jsonl, line 1: the prompt is a conversation, but" in refusal(config_of(without), chat(("user", "1")))
    assert "no prompt is a conversation" in refusal(config_of(with_template, think=True), text("1"))
    assert "thin does not occur" in refusal(config_of(with_template, thin=True), chat(("user", "1"))), "a part of think"
    assert "thinking does not occur" in refusal(config_of(with_template, thinking=True), chat(("user", "1")))
    assert "tokenize is set by this program" in refusal(config_of(with_template, tokenize=1), chat(("user", "1")))
    check_template(config_of(with_template, think=True), [text("1"), chat(("user", "1"))], str)
    check_template(config_of(without), [text("1")], str)


def test_a_tokenizer_that_does_not_load_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer in model\.path=\S+ do not load") as caught:
        tokenizing(config_of(str(tmp_path)))
    assert "\n" not in str(caught.value) and "trust_remote_code" in str(caught.value)


def test_the_fingerprint_covers_the_template(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, template=TEMPLATE)
    before = fingerprint(ModelConfig(path=path))
    assert before == fingerprint(ModelConfig(path=path))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert before == fingerprint(ModelConfig(path=path))
    (tmp_path / "chat_template.jinja").write_text("another")
    assert before != fingerprint(ModelConfig(path=path))
