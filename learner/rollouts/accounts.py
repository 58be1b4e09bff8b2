"""What a member has failed at: how long it gets no lease, and when it has to leave.

A failure is a lease that the actor could not sample, or a group that cannot be what was leased. After one the member
waits before its next lease, twice as long each time, and until it delivers a good group it gets one lease at a time.
One wait is one strike, however many leases failed meanwhile: what goes wrong in an engine fails all that it samples.
It has to leave when it has had MAX_STRIKES over as many different prompts: one prompt that nobody can sample is not
its fault. Groups that were refused are never forgotten, because no prompt is to blame for them.
"""

from dataclasses import dataclass, field

MAX_STRIKES = 6
MAX_REFUSED = 3  # groups
FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 16.0


@dataclass
class Account:
    """`now` is a monotonic time in seconds."""

    strikes: int = 0  # since the last good group, as the prompts and the wait
    num_refused: int = 0
    _prompts: set[str] = field(default_factory=set)
    waits_until_s: float = float("-inf")

    def fail(self, prompt_uid: str, now: float) -> None:
        """A lease of this prompt has failed."""
        self._prompts.add(prompt_uid)
        if now < self.waits_until_s:
            return
        self.strikes += 1
        self.waits_until_s = now + min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (self.strikes - 1))

    def refuse(self, prompt_uid: str, now: float) -> None:
        """Its group for this prompt was refused."""
        self.num_refused += 1
        self.fail(prompt_uid, now)

    def succeed(self) -> None:
        """A good group has come."""
        self.strikes, self.waits_until_s = 0, float("-inf")
        self._prompts.clear()

    def room(self, capacity: int, now: float) -> int:
        """Leases that it may hold now."""
        if now < self.waits_until_s:
            return 0
        return min(1, capacity) if self.strikes else capacity

    @property
    def verdict(self) -> str | None:
        """Why the member has to leave, or None."""
        if self.num_refused >= MAX_REFUSED:
            return f"{self.num_refused} of its groups were refused"
        if self.strikes >= MAX_STRIKES and len(self._prompts) >= MAX_STRIKES:
            return f"it failed on {len(self._prompts)} prompts in a row"
        return None
