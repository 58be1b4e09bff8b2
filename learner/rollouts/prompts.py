"""The order in which a run draws its prompts: a pure function of (prompts, shares, seed, position)."""

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property

from common.config import ConfigError
from common.tasks import Share
from common.types import JSON, Prompt


class PromptStream:
    """Every prompt once per epoch, for ever, each epoch shuffled by (seed, epoch).

    With `shares`, parts of `prompts` that lie one after another are mixed by weight: the next prompt comes from the
    part that is furthest behind its share, so that a batch of any size is mixed as asked. Each part has epochs of its
    own: a small file with a large share is seen more often.

    Raises ConfigError for an empty set or for a uid that occurs twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shares: Sequence[Share] = ()) -> None:
        if not prompts:
            raise ConfigError("the training set is empty; check task.train_file or task.num_train")
        self._prompts = prompts
        self._index = {prompt.uid: index for index, prompt in enumerate(prompts)}
        if len(self._index) != len(prompts):
            raise ConfigError(f"{len(prompts)} training prompts have only {len(self._index)} different uids")
        self._seed = seed
        self._sizes = [share.num_prompts for share in shares] or [len(prompts)]
        assert sum(self._sizes) == len(prompts) and min(self._sizes) > 0
        weights = [share.weight for share in shares] or [1.0]
        self._shares = [weight / sum(weights) for weight in weights]
        self._drawn = [0] * len(self._sizes)  # from each part, since the start of the run
        self._orders: dict[int, tuple[int, list[int]]] = {}  # part: (epoch, its order)

    def next(self) -> Prompt:
        part = self._part_behind()
        epoch, position = divmod(self._drawn[part], self._sizes[part])
        self._drawn[part] += 1
        return self._prompts[sum(self._sizes[:part]) + self._order(part, epoch)[position]]

    def find(self, uid: str) -> Prompt:
        """Raises ConfigError when the prompt is not in the set (the data changed under a checkpoint)."""
        if uid not in self._index:
            raise ConfigError(f"prompt {uid!r} of the checkpoint is not in the training set; use the same data")
        return self._prompts[self._index[uid]]

    def __len__(self) -> int:
        return len(self._prompts)

    def state_dict(self) -> dict[str, JSON]:
        return {
            "seed": self._seed,
            "drawn": list(self._drawn),
            "sizes": self._sizes,
            "shares": self._shares,
            "fingerprint": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        """Of the prompts' uids and texts. References may be corrected between two parts of a run."""
        digest = hashlib.blake2b(digest_size=16)
        for prompt in self._prompts:
            digest.update(repr((prompt.uid, prompt.text, prompt.messages)).encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        """Raises ConfigError when the state belongs to another training set."""
        if state["sizes"] != self._sizes:
            raise ConfigError(
                f"the checkpoint was made with {_numbers(state['sizes'])} training prompts, now there are "
                f"{_numbers(self._sizes)}; use the same data"
            )
        if state["shares"] != self._shares:
            raise ConfigError(
                f"the checkpoint was made with the shares {_numbers(state['shares'])} of task.train_files, now they "
                f"are {_numbers(self._shares)}; use the same weights"
            )
        if state["fingerprint"] != self._fingerprint:
            raise ConfigError(
                f"the checkpoint was made with other training prompts, although as many ({len(self._prompts)}); "
                "use the same data"
            )
        self._seed, self._drawn = state["seed"], list(state["drawn"])
        self._orders.clear()

    def _part_behind(self) -> int:
        position = sum(self._drawn) + 1
        behind = [share * position - drawn for share, drawn in zip(self._shares, self._drawn, strict=True)]
        return behind.index(max(behind))

    def _order(self, part: int, epoch: int) -> list[int]:
        if self._orders.get(part, (None,))[0] != epoch:
            order = list(range(self._sizes[part]))
            random.Random(f"{self._seed}/{epoch}" + (f"/{part}" if part else "")).shuffle(order)
            self._orders[part] = (epoch, order)
        return self._orders[part][1]


def _numbers(values: Sequence[float]) -> str:
    return " + ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
