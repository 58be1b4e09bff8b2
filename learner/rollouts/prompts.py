"""The order in which a run draws its prompts: a pure function of (prompts, seed, position)."""

import hashlib
import random
from collections.abc import Sequence
from functools import cached_property

from common.config import ConfigError
from common.types import JSON, Prompt


class PromptStream:
    """Every prompt once per epoch, for ever, each epoch shuffled by (seed, epoch).

    Raises ConfigError for an empty set or for a uid that occurs twice.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise ConfigError("the training set is empty; check task.train_file or task.num_train")
        self._prompts = prompts
        self._index = {prompt.uid: index for index, prompt in enumerate(prompts)}
        if len(self._index) != len(prompts):
            raise ConfigError(f"{len(prompts)} training prompts have only {len(self._index)} different uids")
        self._seed = seed
        self._epoch = 0
        self._position = 0  # of the next prompt in this epoch's order
        self._order = self._shuffled()

    def next(self) -> Prompt:
        if self._position == len(self._prompts):
            self._epoch += 1
            self._position = 0
            self._order = self._shuffled()
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        return prompt

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
            "epoch": self._epoch,
            "position": self._position,
            "count": len(self),
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
        if state["count"] != len(self._prompts):
            raise ConfigError(
                f"the checkpoint was made with {state['count']} training prompts, now there are "
                f"{len(self._prompts)}; use the same data"
            )
        if state["fingerprint"] != self._fingerprint:
            raise ConfigError(
                f"the checkpoint was made with other training prompts, although as many ({len(self._prompts)}); "
                "use the same data"
            )
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(len(self._prompts)))
        random.Random(f"{self._seed}/{self._epoch}").shuffle(order)
        return order
