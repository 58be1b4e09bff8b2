"""From token ids to the text of each token."""

from collections.abc import Callable, Sequence
from itertools import pairwise

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # decoders write it for bytes that are no whole character
LONGEST_CHARACTER = 4  # bytes in UTF-8, and no token is less than one

Decode = Callable[[Sequence[int]], str]


def token_texts(decode: Decode, token_ids: Sequence[int]) -> list[str]:
    """`decode(token_ids)` in as many pieces as there are tokens, which together are that text whatever `decode` does.

    A character whose bytes are spread over several tokens belongs to the last of them, and the others are "". Each
    token is decoded behind the one before, because some tokenizers write a space or none by what stands there. (The
    idea is that of the incremental detokenization of text-generation-inference and vLLM.)
    """
    whole = decode(token_ids)
    alone = [decode([token_id]) for token_id in token_ids]
    if "".join(alone) == whole:  # as nearly always: with byte-level tokens that are whole characters
        return alone
    return [whole[start:end] for start, end in pairwise([0, *_ends(decode, token_ids, len(whole))])]


def _ends(decode: Decode, token_ids: Sequence[int], length: int) -> list[int]:
    """Where each token's piece ends in the whole text, which has `length` characters."""
    ends = [0]
    start, read, end = 0, 0, 0  # tokens [start, read) are the context, and their text, which ends at `end`, is done
    grown = 0  # tokens after the last that ended a character
    known = ""
    for stop in range(1, len(token_ids) + 1):
        text = decode(token_ids[start:stop])
        is_too_long = stop - grown > LONGEST_CHARACTER  # for a character to come of it
        settled = text if is_too_long else text.rstrip(REPLACEMENT)
        ends.append(min(length, max(ends[-1], end + len(settled) - len(known))))
        grown = stop if ends[-1] > ends[-2] else grown
        if settled == text and len(text) > len(known):
            start, read, end = read, stop, ends[-1]
            known = decode(token_ids[start:read])
    return [*ends[1:-1], length]
