"""The records that cross a process boundary, in flow order.

    Prompt -> Lease -> Progress, CompletedGroup -> TrajectoryGroup     what is sampled and trained
    Hello, Ready, Heartbeat, Draining, Bye / Welcome, SayHello, ...    who takes part
    WeightsCommand -> WeightsReport                                    who holds which weights
    Watch -> RunStatus                                                 how the run stands, for who only looks

Axes: n members of a group, L tokens of one completion, T tokens of all n completions laid end to end, P of n prefixes.

Example, n = 2 with completions of 3 and 2 tokens (T = 5):

    lengths            [3, 2]
    token_ids          [a0 a1 a2 | b0 b1]
    behavior_logprobs  [.. .. .. | .. ..]    log-prob of each token when it was drawn, at the sampling temperature
    versions           [ 4  4  5 |  4  5]    policy version that drew each token, stamped by the engine
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from common.fields import ArraySpec, Count, Seconds, Text

PROTOCOL_VERSION = 6
BYTES_PER_TOKEN = 12  # of a group on its way: id, log-prob and version of each token
LARGEST_REWARD = 1e6  # in magnitude, of one response: sums of squares over a batch stay far inside float32

MAX_CAPACITY = 1024  # groups of one actor: more than an engine schedules at once, and far from all leases of a run
MAX_LISTED = 4 * MAX_CAPACITY  # lease ids in one list of an actor's

MAX_SHOWN_MEMBERS = 256  # in a status

_SECRET = re.compile(r"[0-9a-f]{32}")

JSON: TypeAlias = Any  # None | bool | int | float | str | list[JSON] | dict[str, JSON]; checked by the wire


Int32Array: TypeAlias = Annotated[npt.NDArray[np.int32], ArraySpec("int32", 1)]
Float32Array: TypeAlias = Annotated[npt.NDArray[np.float32], ArraySpec("float32", 1)]


class Verdict(StrEnum):
    """What the verifier says of one response."""

    CORRECT = "correct"
    WRONG = "wrong"
    UNANSWERED = "unanswered"
    TIMED_OUT = "timed_out"
    ERROR = "error"  # nothing of the response: the verifier itself failed. Such a group is never trained on


class AnswerForm(StrEnum):
    """Which spellings of a right answer the mathematical verifier accepts."""

    EXACT = "exact"  # worked out as its reference is: no formula where that is a number
    ANY = "any"  # whatever has the value of the reference


class FinishReason(StrEnum):
    """Why sampling ended: end-of-sequence or a stop string was drawn, or max_tokens was reached (truncated)."""

    STOP = "stop"
    LENGTH = "length"


class Purpose(StrEnum):
    """What a lease is for. Evaluation groups are never trained on."""

    TRAIN = "train"
    EVAL = "eval"


class DropReason(StrEnum):
    """Why a group that was handed out did not reach the policy loss."""

    STALE = "stale"  # its oldest token was over max_staleness versions old at consumption
    ACTOR_LOST = "actor_lost"  # its actor missed heartbeats, said bye or was refused: back to pending
    HUNG = "hung"  # its engine made no progress with it: back to pending
    STRAGGLER = "straggler"  # it kept the next batch waiting on a slow actor: back to pending
    DUPLICATE = "duplicate"  # a second copy of a group already received
    UNKNOWN_LEASE = "unknown_lease"  # a group for a lease that this actor does not hold
    MALFORMED = "malformed"  # failed validation on arrival
    UNINFORMATIVE = "uninformative"  # dynamic sampling: all of its completions right, or all wrong
    FAILED = "failed"  # its actor could not sample it
    CHANGED = "changed"  # it waited in a checkpoint, and the resume asks for something else: back to pending
    VERIFIER_ERROR = "verifier_error"  # the verifier failed on one of its completions


class WeightsPhase(StrEnum):
    """The steps of one publication, in order. A phase starts when every member has acknowledged the one before.

    SLEEP and WAKE frame a training step (actors.sleep_while_training), apart from any publication.
    """

    PAUSE = "pause"  # stop scheduling, keep requests
    INIT = "init"  # join a new transfer group (only when the membership changed)
    START = "start"  # prepare the model to be overwritten
    UPDATE = "update"  # receive and load one bucket; runs while the learner sends it
    FINISH = "finish"  # post-process, stamp the version
    RESUME = "resume"  # schedule again, and score the probe under the new weights
    SLEEP = "sleep"  # stop scheduling, keep requests, give the GPU's memory back
    WAKE = "wake"  # take it again, and schedule


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a task. `uid` is stable across runs; `row` holds what the verifier needs besides `reference`.

    Either `text` is the prompt as it stands, or `messages` are chat turns for the tokenizer's chat template.
    """

    uid: str
    text: str
    reference: str
    messages: tuple[dict[str, str], ...] | None = None
    row: dict[str, JSON] = field(default_factory=dict)


def _no_ints() -> Int32Array:
    return np.empty(0, dtype=np.int32)


def _no_floats() -> Float32Array:
    return np.empty(0, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Learner -> actor: sample `num_samples` completions of this prompt, verify them and send them as one group.

    The prefix is what an earlier holder of the prompt has sampled: each completion goes on from there, and the group
    holds its tokens with the log-probs and versions given here. Raises ValueError when its lengths do not add up.
    """

    lease_id: int
    purpose: Purpose
    prompt_uid: str
    prompt_token_ids: Int32Array  # [prompt tokens]
    reference: str
    row: dict[str, JSON]
    num_samples: int
    seed: int
    temperature: float
    max_tokens: int
    stop: tuple[str, ...] = ()  # strings that end a completion, which holds them
    top_p: float = 1.0  # less only in evaluations
    top_k: int = 0  # 0: all tokens; otherwise only in evaluations
    prefix_lengths: Int32Array = field(default_factory=_no_ints)  # [n]; or empty: none has a prefix
    prefix_token_ids: Int32Array = field(default_factory=_no_ints)  # [P]
    prefix_behavior_logprobs: Float32Array = field(default_factory=_no_floats)  # [P]
    prefix_versions: Int32Array = field(default_factory=_no_ints)  # [P]
    prefix_finish_reasons: tuple[FinishReason | None, ...] = ()  # [n], None: goes on; or empty as the lengths

    def __post_init__(self) -> None:
        _check_tokens(
            f"lease {self.lease_id}",
            self.prefix_lengths,
            (self.prefix_token_ids, self.prefix_behavior_logprobs, self.prefix_versions),
        )
        if len(self.prefix_lengths) not in (0, self.num_samples):
            raise ValueError(
                f"lease {self.lease_id}: {len(self.prefix_lengths)} prefixes for {self.num_samples} completions"
            )
        if len(self.prefix_finish_reasons) != len(self.prefix_lengths):
            raise ValueError(
                f"lease {self.lease_id}: {len(self.prefix_finish_reasons)} finish reasons for "
                f"{len(self.prefix_lengths)} prefixes"
            )


def _check_tokens(what: str, lengths: Int32Array, per_token: tuple[npt.NDArray[Any], ...]) -> None:
    """Raises ValueError unless every array has as many tokens as the lengths, none of them negative, add up to."""
    num_tokens = int(lengths.sum(dtype=np.int64))
    if any(len(array) != num_tokens for array in per_token) or (len(lengths) and int(lengths.min()) < 0):
        raise ValueError(
            f"{what}: the lengths {lengths[:8].tolist()} sum to {num_tokens} over {len(lengths)} completions, but it "
            f"carries {tuple(map(len, per_token))} tokens, log-probs and versions"
        )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Actor -> learner: tokens of a lease under way that were drawn since the last such message.

    Positions count from the start of a completion, a prefix included. Raises ValueError when the lengths do not add up.
    """

    lease_id: int
    starts: Int32Array  # [n], tokens of each completion that were sent before
    lengths: Int32Array  # [n], of the new ones
    token_ids: Int32Array  # [T]
    behavior_logprobs: Float32Array  # [T]
    versions: Int32Array  # [T]
    finish_reasons: tuple[FinishReason | None, ...]  # [n], None: it is being sampled, or not all of it has been sent

    def __post_init__(self) -> None:
        what = f"progress of lease {self.lease_id}"
        _check_tokens(what, self.lengths, (self.token_ids, self.behavior_logprobs, self.versions))
        n = len(self.lengths)
        if n == 0 or len(self.starts) != n or len(self.finish_reasons) != n or int(self.starts.min()) < 0:
            raise ValueError(
                f"{what}: {n} lengths, {len(self.finish_reasons)} finish reasons, and the starts "
                f"{self.starts[:8].tolist()}"
            )


@dataclass(frozen=True, kw_only=True)
class CompletedGroup:
    """Actor -> learner: all completions of one lease. Raises ValueError when the lengths do not add up."""

    lease_id: int
    lengths: Int32Array  # [n]
    token_ids: Int32Array  # [T]
    behavior_logprobs: Float32Array  # [T]
    versions: Int32Array  # [T]
    rewards: Float32Array  # [n]
    verdicts: tuple[Verdict, ...]  # [n]
    verifier_error: Text | None  # what the verifier raised or returned, of the first completion that has Verdict.ERROR
    finish_reasons: tuple[FinishReason, ...]  # [n]
    generation_s: Seconds  # for which the engine was busy; publications, in which it is paused, do not count
    verification_s: Seconds

    def __post_init__(self) -> None:
        num_tokens, n = int(self.lengths.sum()), len(self.lengths)
        per_token = (len(self.token_ids), len(self.behavior_logprobs), len(self.versions))
        per_member = (len(self.rewards), len(self.verdicts), len(self.finish_reasons))
        if any(length != num_tokens for length in per_token) or any(length != n for length in per_member):
            raise ValueError(
                f"group of lease {self.lease_id}: lengths sum to {num_tokens} over {n} completions, but it carries "
                f"{per_token} tokens, log-probs, versions and {per_member} rewards, verdicts, finish reasons"
            )
        if n == 0 or int(self.lengths.min()) < 1:
            raise ValueError(f"group of lease {self.lease_id}: every completion needs at least one token")


@dataclass(frozen=True, kw_only=True)
class TrajectoryGroup:
    """A group in the learner's hands: what was leased, who sampled it, and what came back."""

    lease: Lease
    actor: str
    completed: CompletedGroup
    arrived_s: float  # learner's monotonic clock

    @property
    def oldest_version(self) -> int:
        return int(self.completed.versions.min())

    @property
    def newest_version(self) -> int:
        return int(self.completed.versions.max())


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Actor -> learner, first message, and again when asked or on a new connection. The fingerprints must equal the
    learner's, else the actor is refused.

    `secret` is drawn anew by each process and told to the learner alone: by it a member is known on whatever connection
    it greets. `run_id`, `incarnation` and `number` are those of the last Welcome, None before the first. Raises
    ValueError for a secret of another form, or lists that are too long.
    """

    protocol_version: int
    name: str
    secret: str = field(repr=False)  # 32 hexadecimal digits
    capacity: int  # groups that it will hold at once
    model_fingerprint: str
    tokenizer_fingerprint: str
    run_id: str | None
    incarnation: int | None
    number: int | None
    held: Int32Array  # ids of leases that it still samples
    finished: Int32Array  # ids of groups that it keeps, because no Ack has come

    def __post_init__(self) -> None:
        _check_listed(self.held, self.finished)
        if _SECRET.fullmatch(self.secret) is None:
            raise ValueError(f"a secret of {len(self.secret)} characters that is no 32 hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Learner -> actor: you are a member. Cancel follows for each lease of the Hello that is not wanted any more."""

    run_id: str  # made once per run directory
    incarnation: int  # how often the learner of this run has been started
    number: int  # of the member, see MemberId
    settings: dict[str, JSON]  # what must agree (common/agreement.py)
    heartbeat_s: float  # send a heartbeat at least this often
    timeout_s: float  # silence of the learner after which the actor connects anew
    probe_token_ids: Int32Array  # [probe tokens], scored after every update


@dataclass(frozen=True, kw_only=True)
class SayHello:
    """Learner -> actor: the last message came from somebody that the learner does not know, or has lost sight of."""

    reason: Text


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Learner -> actor: the last message was not accepted; `fatal` means leave."""

    reason: Text
    fatal: bool


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Actor -> learner: the engine is up and holds `version`; the answer to every Welcome, once it is."""

    version: int
    probe_logprobs: Float32Array  # [probe tokens - 1], of the model folder's weights; empty when it greets again


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Actor -> learner, every heartbeat_s: the leases under way, and counters since the actor started."""

    lease_ids: Int32Array  # [leases] that it samples or verifies
    lease_tokens: Int32Array  # [leases], tokens that it has drawn for each so far, a prefix not counted
    generated_tokens: Count
    busy_s: Seconds  # time with at least one response in the engine and generation not paused; the probe is none
    uptime_s: Seconds  # time since Ready

    def __post_init__(self) -> None:
        _check_listed(self.lease_ids)
        if len(self.lease_tokens) != len(self.lease_ids) or min(self.lease_tokens.tolist(), default=0) < 0:
            raise ValueError(f"{len(self.lease_ids)} leases with the tokens {self.lease_tokens[:8].tolist()}")


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """Learner -> actor: the answer to a heartbeat."""

    version: int


@dataclass(frozen=True, kw_only=True)
class Ack:
    """Learner -> actor: the group of this lease has arrived (or is not wanted); forget it."""

    lease_id: int


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Learner -> actor: abort this lease's requests; nobody waits for them."""

    lease_id: int


class MemberId(NamedTuple):
    """An actor process that takes part. A restarted actor of the same name is another member."""

    name: str
    number: int  # of its joining, counted over the life (incarnation) of the learner


@dataclass(frozen=True, kw_only=True)
class WeightsCommand:
    """Learner -> actor: do `phase` of publication `version`. `payload` is the transfer backend's own."""

    command_id: int  # a version may be published again, and a phase is repeated for every bucket
    phase: WeightsPhase
    version: int
    payload: dict[str, JSON]


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """Actor -> learner: `phase` is done, or failed with `error`. RESUME carries the probe's log-probs."""

    command_id: int  # of the command that this answers
    phase: WeightsPhase
    version: int
    error: Text | None
    is_shared: bool  # the error is a collective's, which fails for all when it fails for one
    probe_logprobs: Float32Array  # [probe tokens - 1] after RESUME, else empty


@dataclass(frozen=True, kw_only=True)
class LeaseFailed:
    """Actor -> learner: this lease could not be sampled (for example a prompt longer than the model allows)."""

    lease_id: int
    reason: Text


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Learner -> actor: the run is over; leave with exit code 0."""

    reason: Text


@dataclass(frozen=True, kw_only=True)
class Draining:
    """Actor -> learner: lease me nothing more; I finish what I can, then say bye."""


@dataclass(frozen=True, kw_only=True)
class Bye:
    """Actor -> learner: leaving; what it held is leased to others. `error` is None when that was asked for."""

    error: Text | None


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Observer -> learner: how does the run stand? Who asks is no member by that; see learner/rollouts/observers.py."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """Learner -> observer: the answer to Watch. Raises ValueError when the columns of a table differ in length.

    Axes: M members, E evaluations, S of the last steps, oldest first.
    """

    run: str  # its name
    incarnation: int  # of the learner
    step: int  # done, warm-up included
    warmup_steps: int
    num_steps: int  # warm-up included
    remaining_s: float | None  # None before the first step
    uptime_s: float  # of the learner
    step_age_s: float  # since the last step was done, or the learner has started
    version: int
    max_staleness: int
    group_target: int  # groups of a step
    metrics: dict[str, float]  # of the last step
    counters: dict[str, float]  # of now (Coordinator.stats)
    evaluated_steps: Int32Array  # [E], last done when an evaluation's result came
    accuracies: Float32Array  # [E]
    rewards: Float32Array  # [S], mean of each step
    response_lengths: Float32Array  # [S], mean of each step
    alarms: tuple[str, ...]  # the last lines, oldest first
    member_names: tuple[str, ...]  # [M]
    member_states: tuple[str, ...]  # [M]
    member_versions: tuple[int | None, ...]  # [M], None: no whole one
    member_tokens_per_s: Float32Array  # [M], over the last seconds
    member_leases: Int32Array  # [M], that it holds
    member_silences_s: Float32Array  # [M], since it was heard
    num_members: int  # of which M at most MAX_SHOWN_MEMBERS

    def __post_init__(self) -> None:
        tables = (
            (self.evaluated_steps, self.accuracies),
            (self.rewards, self.response_lengths),
            (
                self.member_names,
                self.member_states,
                self.member_versions,
                self.member_tokens_per_s,
                self.member_leases,
                self.member_silences_s,
            ),
        )
        for columns in tables:
            if len(lengths := set(map(len, columns))) > 1:
                raise ValueError(f"a status has columns of different lengths {sorted(lengths)}")


def _check_listed(*lists: Int32Array) -> None:
    """Each id may be answered, so that nobody may list any number of them."""
    if (longest := max(map(len, lists))) > MAX_LISTED:
        raise ValueError(f"{longest} lease ids, more than the {MAX_LISTED} that an actor can have")


ActorMessage: TypeAlias = (
    Hello | Ready | Progress | CompletedGroup | LeaseFailed | Heartbeat | WeightsReport | Draining | Bye | Watch
)
LearnerMessage: TypeAlias = (
    Welcome | SayHello | Refused | Lease | Ack | Cancel | Pulse | WeightsCommand | Stop | RunStatus
)
Message: TypeAlias = ActorMessage | LearnerMessage
