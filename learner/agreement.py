"""What the learner's ranks tell each other beside tensors: small JSON values, and that one of them cannot go on."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from common.causes import CannotWrite
from common.config import ConfigError
from common.types import JSON


def gather(value: JSON, group: dist.ProcessGroup | None) -> list[JSON]:
    """Every rank's `value`, by rank; a collective. Without a group the process is alone."""
    if group is None:
        return [value]
    mine = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group)
    longest = max(int(length) for length in lengths)
    padded = torch.cat([mine, torch.zeros(longest - len(mine), dtype=torch.uint8)])
    texts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(texts, padded, group)
    return [json.loads(bytes(text[:length].tolist())) for text, length in zip(texts, lengths, strict=True)]


@contextmanager
def all_or_none(what: str, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What keeps one rank from `what` (a file that cannot be written) ends it on every rank, in the same words.

    A collective. Otherwise the others would wait in their next one for a rank that has left. Raises ConfigError
    where that was raised, else CannotWrite.
    """
    problem: list[JSON] | None = None  # [whether it is the user's mistake, sentence]
    try:
        yield
    except ConfigError as error:
        problem = [True, str(error)]
    except (OSError, CheckpointException) as error:
        problem = [False, f"{what} on {socket.gethostname()}: {_reason(error)}"]
    if found := next(filter(None, gather(problem, group)), None):
        is_mistake, sentence = found
        raise ConfigError(sentence) if is_mistake else CannotWrite(sentence)


def _reason(error: BaseException) -> str:
    """In one line. torch's exception holds what each rank met, and its writer hides what the system said."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if isinstance(error, OSError) else f"torch failed to write, as it does when the disk is full ({line})"
