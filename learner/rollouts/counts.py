"""What a run counts on its data side; every counter is kept over checkpoints."""

import logging
from collections import Counter

from common.types import JSON, CompletedGroup, DropReason

logger = logging.getLogger(__name__)

REMEMBERED_LEASES = 10_000  # ids of received groups, kept to tell a duplicate from an unknown lease

_TOTALS = (
    "received_groups",
    "received_tokens",
    "generation_s",
    "verification_s",
    "lease_failures",
    "trained_groups",
    "actors_dismissed",
    "actors_forgotten",
    "prefix_tokens",  # that a lease was handed out with: drawn before by another holder, and not drawn again
)


class Counts:
    """Totals, drops by reason, failures by prompt, and which leases have been answered."""

    def __init__(self) -> None:
        self.totals = dict.fromkeys(_TOTALS, 0.0)
        self.drops: Counter[DropReason] = Counter()
        self.dropped_tokens: Counter[DropReason] = Counter()
        self.failures: dict[str, Counter[str]] = {}  # by prompt uid: how often on which actor, since it was sampled
        self._received: dict[int, None] = {}

    def drop(self, reason: DropReason, lease_id: int, actor: str, num_tokens: int = 0) -> None:
        """`num_tokens` are those that go down with it."""
        self.drops[reason] += 1
        self.dropped_tokens[reason] += num_tokens
        logger.info("lease %d of actor %s dropped: %s", lease_id, actor, reason)

    def receive(self, group: CompletedGroup) -> None:
        self._received[group.lease_id] = None
        if len(self._received) > REMEMBERED_LEASES:
            del self._received[next(iter(self._received))]
        self.totals["received_groups"] += 1
        self.totals["received_tokens"] += len(group.token_ids)
        self.totals["generation_s"] += group.generation_s
        self.totals["verification_s"] += group.verification_s

    def has_received(self, lease_id: int) -> bool:
        """Whether a good group of this lease has come, as far as is remembered."""
        return lease_id in self._received

    def fail(self, uid: str, actor: str) -> Counter[str]:
        """One more failure of this prompt; how many in a row on which actor."""
        failures = self.failures.setdefault(uid, Counter())
        failures[actor] += 1
        self.totals["lease_failures"] += 1
        return failures

    def stats(self) -> dict[str, float]:
        groups = {f"dropped/{reason}": self.drops[reason] for reason in DropReason}
        tokens = {f"dropped_tokens/{reason}": self.dropped_tokens[reason] for reason in DropReason}
        return self.totals | groups | tokens

    def state_dict(self) -> dict[str, JSON]:
        return {
            "totals": dict(self.totals),
            "drops": {str(reason): count for reason, count in self.drops.items()},
            "dropped_tokens": {str(reason): count for reason, count in self.dropped_tokens.items()},
            "failures": {uid: dict(failures) for uid, failures in self.failures.items()},
        }

    def load_state_dict(self, state: dict[str, JSON]) -> None:
        self.totals |= state["totals"]
        self.drops = Counter({DropReason(reason): count for reason, count in state["drops"].items()})
        self.dropped_tokens = Counter({DropReason(reason): n for reason, n in state["dropped_tokens"].items()})
        self.failures = {uid: Counter(failures) for uid, failures in state["failures"].items()}
