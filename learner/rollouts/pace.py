"""How far sampling may run ahead of training."""

from common.config import Config
from common.types import JSON


class Pace:
    """The admission window, in groups counted from the start of the run: AReaL's rule (arXiv 2505.24298).

    A version lasts publish_every = E policy steps, and what is sampled now may be max_staleness = S versions old when
    it is trained. With p policy steps done, the version under way ends after n = (p // E + 1) E of them, so

        window = prompts_per_step * (warm-up steps + min(n + S E, learner.steps))

    During the critic's warm-up no version ends, and its whole window would wait on rank 0. There sampling runs ahead by
    as many steps as a fresh version allows, (1 + S) E with the one under way, but by 2 at least, so that actors
    sample while the learner trains. While a gate may still end the warm-up, only the step under way is sure to belong
    to it.

    Everything is counted in steps, so that a resume may change every setting above.
    """

    def __init__(self, config: Config) -> None:
        self._groups_per_step = config.rollout.prompts_per_step
        self._steps_per_version = config.weights.publish_every
        self._max_staleness = config.staleness.max_staleness
        self._policy_steps = config.learner.steps
        self._has_gate = config.algorithm.critic_warmup_gate is not None
        self.warmup_steps = config.algorithm.critic_warmup_steps
        self.steps_done = 0  # warm-up included
        self.steps_taken = 0  # one more while a step is under way
        self.is_folder_version_0 = True  # or, after a resume in the middle of it, the weights of a checkpoint

    @property
    def is_warmup(self) -> bool:
        """Whether the next step is, or may be, one of the critic's warm-up."""
        return self.steps_done < self.warmup_steps

    @property
    def window(self) -> int:
        """Groups that may be admitted now."""
        steps = min(self._end(self._max_staleness), self._sure_warmup_steps + self._policy_steps)
        if self.is_warmup:
            steps = min(steps, self.steps_done + max((1 + self._max_staleness) * self._steps_per_version, 2))
        return self._groups_per_step * steps

    def room(self, age: int) -> int:
        """Places for groups that are `age` versions old now, in the batches after the next one, while they are young
        enough. None at all for what may be trained in the next batch only, or is too old already."""
        steps = self._end(self._max_staleness - age) - self.steps_taken - 1
        return self._groups_per_step * max(0, steps)

    def _end(self, versions: int) -> int:
        """Steps that are done, at the least, when the version ends that comes `versions` after the one under way."""
        done = max(0, self.steps_done - self.warmup_steps) // self._steps_per_version
        return self._sure_warmup_steps + (done + 1 + versions) * self._steps_per_version

    @property
    def _sure_warmup_steps(self) -> int:
        return self.steps_done + 1 if self.is_warmup and self._has_gate else self.warmup_steps

    @property
    def taken(self) -> int:
        """Groups in the batches that were taken."""
        return self._groups_per_step * self.steps_taken

    def versions_until(self, place: int) -> int:
        """Versions that are published at most before the group in this place of the order (0: the next) is trained."""
        warmup_steps = min(self.warmup_steps, self.steps_done + 1) if self._has_gate else self.warmup_steps
        steps = (self.steps_done, self.steps_taken + place // self._groups_per_step)
        done, then = (max(0, step - warmup_steps) // self._steps_per_version for step in steps)
        return then - done

    def state_dict(self) -> dict[str, JSON]:
        return {"steps_done": self.steps_done, "warmup_steps": self.warmup_steps}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        self.steps_done = self.steps_taken = state["steps_done"]
        self.warmup_steps = state["warmup_steps"]
        self.is_folder_version_0 = self.steps_done <= self.warmup_steps
