"""The text of each token: the pieces are the whole, and characters that several tokens share stay whole."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from learner.detokenizing import token_texts


def split(content: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = sorted({0, len(content), *(cut % (len(content) + 1) for cut in cuts)})
    return [content[start:end] for start, end in pairwise(ends)]


def pieces_of(tokens: Sequence[bytes]) -> list[str]:
    """With a byte-level tokenizer whose vocabulary is `tokens`."""
    return token_texts(lambda ids: b"".join(tokens[i] for i in ids).decode(errors="replace"), range(len(tokens)))


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")), data=st.data())
def test_a_character_belongs_to_the_last_of_its_tokens(text: str, data: st.DataObject) -> None:
    tokens = split(text.encode(), data.draw(st.lists(st.integers(0, 10_000))))
    sizes = [len(b"".join(tokens[: i + 1]).decode(errors="ignore")) for i in range(len(tokens))]
    assert pieces_of(tokens) == [text[start:end] for start, end in pairwise([0, *sizes])]


def test_characters_that_begin_in_one_anothers_last_tokens_are_whole() -> None:
    content = "0\U00010000\u0800".encode()
    tokens = [content[:2], content[2:3], content[3:4], content[4:6], content[6:7], content[7:]]
    assert pieces_of(tokens) == ["0", "", "", "\U00010000", "", "\u0800"]


@given(st.lists(st.binary(min_size=1, max_size=3)))
def test_the_pieces_are_the_whole_also_where_no_text_was_meant(tokens: list[bytes]) -> None:
    pieces = pieces_of(tokens)
    assert "".join(pieces) == b"".join(tokens).decode(errors="replace")
    assert len(pieces) == len(tokens)


@given(ids=st.lists(st.integers(0, 5)), texts=st.dictionaries(st.integers(0, 7), st.text(max_size=6)))
def test_the_pieces_are_the_whole_whatever_the_tokenizer_does(ids: list[int], texts: dict[int, str]) -> None:
    def decode(token_ids: Sequence[int]) -> str:
        return texts.get(sum(token_ids) % 8, "\ufffd") if len(token_ids) else ""

    pieces = token_texts(decode, ids)
    assert "".join(pieces) == decode(ids)
    assert len(pieces) == len(ids)


def test_a_space_that_depends_on_the_token_before_is_where_it_is_in_the_whole() -> None:
    words = ["he", "llo", "▁world", "▁!"]

    def decode(token_ids: Sequence[int]) -> str:
        """As sentencepiece's decoders do: a space at the beginning of a text is not written."""
        return "".join(words[i] for i in token_ids).replace("▁", " ").removeprefix(" ")

    assert token_texts(decode, [2, 0, 1, 3]) == ["world", "he", "llo", " !"]


@pytest.mark.parametrize("text", ["∑ 漢字 🙂🙃 é", "plain"])
def test_a_real_byte_level_tokenizer(text: str) -> None:
    vocabulary = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())
    pieces = token_texts(tokenizer.decode, ids)
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)
