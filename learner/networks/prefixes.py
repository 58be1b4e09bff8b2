"""Sequences of a packed stream that begin alike: what is common to them is computed once.

A causal network computes the same for a token wherever the same tokens stand before it. The members of a group have
their prompt in common, all prompts of a chat model its system message, and responses may begin alike. Sorted, each
sequence is computed only from where it departs from the one before it; its attention reads the keys and values of the
rest where they are. That is exact but for the order of sums, and the gradient of what is shared is the sum over all
that share it.

The last token of a sequence predicts nothing and is left out. Example, a prompt [p q] with responses [a b c] and
[a d c]; C is the stream of tokens that are computed:

    token_ids_S    [p q a b c | p q a d c]
    token_ids_C    [p q a b | d]
    places_S       [0 1 2 3 . | 0 1 2 4 .]      where in C each token of S is computed
    kept_C         [0 1 2 3 | 8]                where in S each token of C stands
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

NOWHERE = -1  # the place of a token that is not computed


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """Axes: S and C as in the header, K keys: what the sequences with a token in C attend to, in their order there."""

    kept_C: Tensor  # int64
    places_S: Tensor  # int64, NOWHERE for the last token of each sequence
    lengths: tuple[int, ...]  # tokens in C of each sequence that has one there, in the order of C
    key_lengths: tuple[int, ...]  # the same with what is shared
    keys_K: Tensor  # int64, where in C each key is computed


def shared_prefixes(token_ids_S: Tensor, cu_seqlens_B1: Tensor) -> Prefixes:
    """What of these sequences, of two tokens at least, has to be computed. Tensors of the CPU, as the result's."""
    tokens_S, ends = token_ids_S.numpy(), cu_seqlens_B1.tolist()
    reads = [slice(start, end - 1) for start, end in pairwise(ends)]
    reads.sort(key=lambda read: tokens_S[read].tobytes())  # what begins alike is adjacent
    places_S = np.full(len(tokens_S), NOWHERE)
    kept, keys, lengths, key_lengths = [], [], [], []
    before, num_computed = slice(0, 0), 0
    for read in reads:
        num_shared = _num_common(tokens_S[before], tokens_S[read])
        places_S[read][:num_shared] = places_S[before][:num_shared]
        new = np.arange(read.start + num_shared, read.stop)
        if len(new):
            places_S[new] = np.arange(num_computed, num_computed + len(new))
            num_computed += len(new)
            kept.append(new)
            keys.append(places_S[read])
            lengths.append(len(new))
            key_lengths.append(num_shared + len(new))
        before = read
    return Prefixes(
        kept_C=torch.from_numpy(np.concatenate(kept)),
        places_S=torch.from_numpy(places_S),
        lengths=tuple(lengths),
        key_lengths=tuple(key_lengths),
        keys_K=torch.from_numpy(np.concatenate(keys)),
    )


def _num_common(a: np.ndarray, b: np.ndarray) -> int:
    """Leading tokens that are the same in both."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
