"""What the verifiers have said, and when that leads nowhere: a verifier that fails, a task with nothing to learn."""

import logging
from collections import Counter

from common.config import Config
from common.tasks import verifier_function
from common.types import JSON, CompletedGroup, DropReason, Purpose, Verdict

logger = logging.getLogger(__name__)


class Verdicts:
    """`counts` is over all training responses that arrived since the run began; the rest is since the last batch.

    `problem` is the sentence with which the run has to end, or None.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.counts: Counter[Verdict] = Counter()
        self.problem: str | None = None
        self._num_responses = self._num_errors = 0
        self._error = ""  # the last one
        self._in_a_row: Counter[bool] = Counter()  # uninformative groups since an informative one; True: all right

    def add(self, group: CompletedGroup, purpose: Purpose) -> None:
        """Every group that arrives, once."""
        if purpose is Purpose.TRAIN:
            self.counts.update(group.verdicts)
        self._num_responses += len(group.verdicts)
        self._num_errors += group.verdicts.count(Verdict.ERROR)
        self._error = group.verifier_error or self._error
        rollout, share = self._config.rollout, self._config.verifier.max_error_share
        of = max(self._num_responses, rollout.prompts_per_step * rollout.group_size)
        if self._num_errors > share * of:
            self.problem = (
                f"{self._describe_errors()} since the last step, more than verifier.max_error_share={share:g} of "
                f"{of}: correct the function"
            )

    def reason_to_drop(self, group: CompletedGroup, is_filtering: bool) -> DropReason | None:
        """Why a training group that has just arrived is not trained on, if so. `is_filtering`: by dynamic sampling."""
        if Verdict.ERROR in group.verdicts:
            logger.warning("lease %d: the verifier %s", group.lease_id, group.verifier_error)
            return DropReason.VERIFIER_ERROR
        if not is_filtering:
            return None
        if is_informative(group):
            self._in_a_row.clear()
            return None
        self._count_uninformative(group)
        return DropReason.UNINFORMATIVE

    def batch_taken(self) -> None:
        self._num_responses = self._num_errors = 0
        self._in_a_row.clear()

    def describe(self) -> list[str]:
        """What may keep a batch from filling up, for the message of a time-out."""
        parts = [self._describe_errors()] if self._num_errors else []
        return [*parts, f"{self._describe_dropped()} in a row"] if self._in_a_row else parts

    def stats(self) -> dict[str, float]:
        return {f"verdicts/{verdict}": self.counts[verdict] for verdict in Verdict}

    def state_dict(self) -> dict[str, JSON]:
        return {str(verdict): count for verdict, count in self.counts.items()}

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        self.counts = Counter({Verdict(verdict): count for verdict, count in state.items()})

    def _count_uninformative(self, group: CompletedGroup) -> None:
        """Too many in a row are a `problem`."""
        self._in_a_row[Verdict.CORRECT in group.verdicts] += 1
        if self._in_a_row.total() >= self._config.algorithm.max_uninformative:
            self.problem = (
                f"{self._describe_dropped()} in a row: give the model prompts that it solves sometimes, or more tokens "
                f"than rollout.max_tokens={self._config.rollout.max_tokens}"
            )

    def _describe_errors(self) -> str:
        return (
            f"verifier.function={verifier_function(self._config)} failed on {self._num_errors} of "
            f"{self._num_responses} responses (it {self._error})"
        )

    def _describe_dropped(self) -> str:
        right, wrong = self._in_a_row[True], self._in_a_row[False]
        return (
            f"algorithm.dynamic_sampling dropped {right + wrong} groups ({wrong} with all responses wrong, {right} "
            "with all right)"
        )


def is_informative(group: CompletedGroup) -> bool:
    """Some of its responses are right and some are not."""
    return 0 < group.verdicts.count(Verdict.CORRECT) < len(group.verdicts)
