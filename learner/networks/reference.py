"""Does the learner compute a model as plain transformers does? Asked once, when a model is loaded.

The packed forward pass relies on what a model's code does with it: attention through `AttentionInterface`, positions
taken from `position_ids`, an output layer that is one product. A model that departs from that would be trained on
wrong log-probs without any error, so a short batch goes through both passes and a difference is refused.

The same module computes both, with its attention exchanged: no second copy of the weights. It runs in float32 before
the model is sharded, on the one rank that has read the files, and costs a few passes over the weights.

What it cannot see: an attention window longer than LONGEST_WINDOW, and what only sequences longer than the batch's
show; what the GPU kernel does; what the engine computes (learner/publication/probe.py watches that).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from common.config import ConfigError
from learner.algorithm.packing import boundaries
from learner.networks.attention import IMPLEMENTATION

# Sequences of the batch, in tokens: two share a bucket of packed attention, one has no past.
LENGTHS = (5, 19, 2, 19, 11)
LONGEST_WINDOW = 256  # tokens; one more sequence crosses a sliding window that is not longer
SEED = 20250407

# Nats, and shares of the largest hidden state. Rounding gives 1e-6 to 1e-4 in float32, another function 1e-2 and more.
TOLERANCE = 1e-3

PackedForward = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_logprobs(model: PreTrainedModel, packed_logprobs: PackedForward, max_length: int, folder: str) -> None:
    """Refuses a causal language model whose log-probs `packed_logprobs` gets wrong.

    `packed_logprobs` takes token_ids_S, cu_seqlens_B1 and prompt_lengths_B, and `max_length` is the longest sequence
    that the run allows, in tokens. Raises ConfigError in one sentence that names the folder.
    """
    sequences = _batch(model, max_length)
    found = _packed(packed_logprobs, sequences, model, folder)
    with _plain_attention(model):
        expected = [_next_token_logprobs(model, tokens) for tokens in sequences]
    _refuse_difference(found, torch.cat(expected), 1.0, "log-probs", "nats", folder)


def check_hidden_states(
    backbone: PreTrainedModel, packed_hidden_states: PackedForward, max_length: int, folder: str
) -> None:
    """The same for a backbone without an output layer; `packed_hidden_states` gives [T, D]."""
    sequences = _batch(backbone, max_length)
    found = _packed(packed_hidden_states, sequences, backbone, folder)
    with _plain_attention(backbone):
        states = [backbone(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1] for tokens in sequences]
    expected = torch.cat(states)
    _refuse_difference(found, expected, float(expected.abs().max()), "hidden states", "of their largest", folder)


def _batch(model: PreTrainedModel, max_length: int) -> list[Tensor]:
    """Random sequences; the same every time and without touching torch's own generator."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    lengths = LENGTHS if window is None or window > LONGEST_WINDOW else (*LENGTHS, window + 9)
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randint(config.vocab_size, (min(length, max_length),), generator=generator) for length in lengths]


@torch.no_grad()
def _packed(forward: PackedForward, sequences: list[Tensor], model: PreTrainedModel, folder: str) -> Tensor:
    """One value for each token but the first of each sequence, in stream order."""
    lengths_B = torch.tensor([len(tokens) for tokens in sequences])
    try:
        return forward(torch.cat(sequences), boundaries(lengths_B), torch.ones_like(lengths_B))
    except ConfigError as error:
        raise ConfigError(f"model folder {folder} cannot be trained: {error}") from error
    except Exception as error:  # whatever a model's own code does with arguments that it does not know
        raise ConfigError(
            f"model folder {folder} cannot be trained: {type(model).__name__} does not take packed sequences "
            f"({type(error).__name__}: {error})"
        ) from error


@contextmanager
def _plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model as transformers runs it, without gradients, and afterwards as it was."""
    is_training = model.training
    model.eval()
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
        model.train(is_training)


def _next_token_logprobs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def _refuse_difference(found: Tensor, expected: Tensor, scale: float, what: str, unit: str, folder: str) -> None:
    difference = float((found - expected).abs().max()) / scale
    if not difference <= TOLERANCE:
        raise ConfigError(
            f"model folder {folder} cannot be trained: the learner's {what} on packed sequences differ from those of "
            f"plain transformers by {difference:.2g} {unit} (allowed: {TOLERANCE:g}), so its architecture does "
            "something that the learner does not compute"
        )
