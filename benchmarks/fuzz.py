"""Mutated messages against the decoder: whatever arrives, a message or a WireError results, and memory stays small.

    python benchmarks/fuzz.py [--count N] [--seed N]

Starts from real messages of every kind that an actor sends. A mutation changes bytes, lengths, or the structure of
the header, so that some get deep into the checks. Prints what became of them. Exit code 1 when anything else comes out,
or memory grows by more than CAP_MB.
"""

import argparse
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or a module here would hide a package

import msgpack
import numpy as np

from common.types import (
    PROTOCOL_VERSION,
    ActorMessage,
    Bye,
    CompletedGroup,
    Draining,
    FinishReason,
    Heartbeat,
    Hello,
    LeaseFailed,
    Message,
    Progress,
    Ready,
    Verdict,
    Watch,
    WeightsPhase,
    WeightsReport,
)
from common.wire import Frame, WireError, decode, encode, pack, unpack

MAX_BYTES = 1 << 20
CAP_MB = 4.0  # that memory may grow by, however many mutations there are
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2**31, 2**63 - 1, 2**64 - 1, -(2**63), 0.0, float("nan"), float("inf"), "", "x" * 1000, b"\xff",
    [], {}, [[]] * 50, {"": {}}, [2**40], [-1], ["int32"], "int32", "object", "Lease", "correct",
    msgpack.ExtType(5, b"x"),
]  # fmt: skip
ODD_NUMBERS = (0, 1, 3, 4, 63, 64, 65, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def messages() -> list[Message]:
    """One of every kind that an actor, or an observer, may send. KeyError for a kind that has none here."""
    made = {type(message): message for message in _made_up()}
    return [made[kind] for kind in get_args(ActorMessage)]


def _made_up() -> list[Message]:
    probe = np.linspace(-3.0, 0.0, 9, dtype=np.float32)
    group = CompletedGroup(
        lease_id=7,
        lengths=np.array([1, 2], np.int32),
        token_ids=np.array([5, 6, 256], np.int32),
        behavior_logprobs=np.array([-0.5, 0.0, -1.0], np.float32),
        versions=np.array([3, 3, 4], np.int32),
        rewards=np.array([1.0, -1.0], np.float32),
        verdicts=(Verdict.CORRECT, Verdict.TIMED_OUT),
        verifier_error=None,
        finish_reasons=(FinishReason.STOP, FinishReason.LENGTH),
        generation_s=1.5,
        verification_s=0.25,
    )
    report = WeightsReport(
        command_id=1, phase=WeightsPhase.RESUME, version=2, error=None, is_shared=False, probe_logprobs=probe
    )
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        name="a",
        secret="d" * 32,
        capacity=4,
        model_fingerprint="f" * 64,
        tokenizer_fingerprint="e" * 64,
        run_id="r",
        incarnation=2,
        number=3,
        held=np.array([7, 8], np.int32),
        finished=np.array([9], np.int32),
    )
    ids = np.array([7], np.int32)
    beat = Heartbeat(lease_ids=ids, lease_tokens=ids, generated_tokens=99, busy_s=0.5, uptime_s=1.0)
    progress = Progress(
        lease_id=7,
        starts=np.array([0, 4], np.int32),
        lengths=group.lengths,
        token_ids=group.token_ids,
        behavior_logprobs=group.behavior_logprobs,
        versions=group.versions,
        finish_reasons=(None, FinishReason.STOP),
    )
    return [
        group, report, hello, beat, progress, Draining(), Ready(version=0, probe_logprobs=probe),
        LeaseFailed(lease_id=3, reason="long"), Bye(error=None), Watch(),
    ]  # fmt: skip


def mutated(frames: list[bytes], draw: random.Random) -> bytes:
    """A packed message with one to three faults of one kind."""
    kind = draw.randrange(4)
    if kind == 0:
        return _with_odd_structure(frames, draw)
    if kind == 1:
        return _with_odd_frames(frames, draw)
    packed = bytearray(pack(frames))
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(packed))
        if kind == 2:
            packed[place] = draw.randrange(256)
        else:
            number = draw.choice(ODD_NUMBERS).to_bytes(4, "little")
            packed[place : place + 4] = number if draw.random() < 0.7 else b""
    return bytes(packed)


def _with_odd_structure(frames: list[bytes], draw: random.Random) -> bytes:
    """Somewhere in the header stands another value, or nothing."""
    header = msgpack.unpackb(frames[0])
    node: Any = header
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = draw.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and draw.random() < 0.8:
            node = node[key]
            continue
        if draw.random() < 0.1:
            del node[key]
        else:
            node[key] = draw.choice(ODD_VALUES)
        break
    return pack([msgpack.packb(header), *frames[1:]])


def _with_odd_frames(frames: list[bytes], draw: random.Random) -> bytes:
    """A frame is lost, doubled, cut, exchanged, or filled with odd numbers."""
    frames = list(frames)
    i, j = draw.randrange(len(frames)), draw.randrange(len(frames))
    match draw.randrange(5):
        case 0:
            del frames[i]
        case 1:
            frames.insert(i, frames[j])
        case 2:
            frames[i] = frames[i][: draw.randint(0, len(frames[i]))]
        case 3:
            frames[i], frames[j] = frames[j], frames[i]
        case 4:
            frames[i] = b"".join(draw.choice(ODD_NUMBERS).to_bytes(4, "little") for _ in range(len(frames[i]) // 4))
    return pack(frames)


def outcome(packed: Frame) -> str:
    """What the learner makes of these bytes: "decoded", or why not, less the values. Raises what it must not raise."""
    try:
        message = decode(unpack(packed), MAX_BYTES)
    except WireError as error:
        sentence = str(error)
        return "refused: " + "".join("#" if c.isdigit() else c for c in sentence[:40])
    assert isinstance(message, get_args(Message))
    return "decoded" if isinstance(message, get_args(ActorMessage)) else "refused: a message of the learner"


def mutations(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` mutated messages, each with its kind."""
    draw = random.Random(seed)
    sources = [(type(message).__name__, [bytes(frame) for frame in encode(message)]) for message in messages()]
    for _ in range(count):
        kind, frames = draw.choice(sources)
        yield kind, mutated(frames, draw)


def fuzz(count: int, seed: int) -> Counter[str]:
    """Outcomes of `count` mutations. Raises what the decoder must not raise, with a note on which one it was."""
    outcomes: Counter[str] = Counter()
    for number, (kind, packed) in enumerate(mutations(count, seed)):
        try:
            outcomes[outcome(packed)] += 1
        except Exception as error:
            error.add_note(f"mutation {number} of seed {seed}, of a {kind}")
            raise
    return outcomes


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(words)
    fuzz(1000, arguments.seed + 1)  # what is loaded late is loaded
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    outcomes = fuzz(arguments.count, arguments.seed)
    grown_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    refused = arguments.count - outcomes["decoded"]
    print(f"{arguments.count} mutations in {time.monotonic() - started:.0f} s, memory grew by {grown_mb:.1f} MiB")
    print(f"{outcomes['decoded']} decoded, {refused} refused, for {len(outcomes) - 1} reasons; the most frequent:")
    for reason, number in outcomes.most_common(12):
        print(f"  {number:8} {reason}")
    if sum(outcomes.values()) != arguments.count or grown_mb > CAP_MB:
        print(f"error: {sum(outcomes.values())} counted, and memory may grow by {CAP_MB:g} MiB", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
