"""Frames: round trips, the exact bytes, and that nothing which arrives can do more than raise WireError."""

import contextlib
import math
from dataclasses import fields, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.fields import MAX_COUNT, MAX_SECONDS, MAX_TEXT
from common.types import (
    MAX_LISTED,
    PROTOCOL_VERSION,
    Ack,
    ActorMessage,
    Bye,
    CompletedGroup,
    Draining,
    FinishReason,
    Heartbeat,
    Hello,
    Lease,
    LeaseFailed,
    Message,
    Purpose,
    Ready,
    Refused,
    Verdict,
    Watch,
    WeightsCommand,
    WeightsPhase,
    WeightsReport,
    Welcome,
)
from common.wire import MAX_HEADER_BYTES, MAX_JSON_DEPTH, WireError, decode, encode
from tests.support.fake_actors import heartbeat, hello, progress
from tests.support.statuses import make_status

MAX_BYTES = 1 << 20

# tests share two cores: slowness is not a failure
steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ints = st.integers(-(2**63), 2**63 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
secrets = st.from_regex("[0-9a-f]{32}", fullmatch=True)
floats = st.floats(allow_nan=False, allow_infinity=False)
seconds = st.floats(0, MAX_SECONDS)
counts = st.integers(0, MAX_COUNT)
int32s = hnp.arrays(np.int32, st.integers(0, 20))
float32s = hnp.arrays(np.float32, st.integers(0, 20))
json_values = st.recursive(
    st.none() | st.booleans() | ints | floats | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
rows = st.dictionaries(texts, json_values, max_size=3)


@st.composite
def groups(draw: st.DrawFn) -> CompletedGroup:
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    n, num_tokens = len(lengths), sum(lengths)
    return CompletedGroup(
        lease_id=draw(ints),
        lengths=np.array(lengths, np.int32),
        token_ids=draw(hnp.arrays(np.int32, num_tokens)),
        behavior_logprobs=draw(hnp.arrays(np.float32, num_tokens)),
        versions=draw(hnp.arrays(np.int32, num_tokens)),
        rewards=draw(hnp.arrays(np.float32, n)),
        verdicts=tuple(draw(st.lists(st.sampled_from(Verdict), min_size=n, max_size=n))),
        verifier_error=draw(st.none() | texts),
        finish_reasons=tuple(draw(st.lists(st.sampled_from(FinishReason), min_size=n, max_size=n))),
        generation_s=draw(seconds),
        verification_s=draw(seconds),
    )


leases = st.builds(
    Lease, lease_id=ints, purpose=st.sampled_from(Purpose), prompt_uid=texts, prompt_token_ids=int32s,
    reference=texts, row=rows, num_samples=ints, seed=ints, temperature=floats, max_tokens=ints,
    stop=st.lists(texts, max_size=3).map(tuple), top_p=floats, top_k=ints,
)  # fmt: skip
progresses = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(0, 99), max_size=5)), min_size=1, max_size=4
).map(lambda parts: progress(7, [start for start, _ in parts], [tokens for _, tokens in parts], ended=(0, 2)))
messages: st.SearchStrategy[Any] = st.one_of(
    progresses,
    groups(),
    leases,
    st.builds(Hello, protocol_version=ints, name=texts, secret=secrets, capacity=ints, model_fingerprint=texts,
              tokenizer_fingerprint=texts, run_id=st.none() | texts, incarnation=st.none() | ints,
              number=st.none() | ints, held=int32s, finished=int32s),
    st.builds(Ready, version=ints, probe_logprobs=float32s),
    st.builds(heartbeat, st.dictionaries(st.integers(-9, 9), st.integers(0, 2**31 - 1)), counts, seconds, seconds),
    st.builds(Welcome, run_id=texts, incarnation=ints, number=ints, settings=rows, heartbeat_s=floats,
              timeout_s=floats, probe_token_ids=int32s),
    st.builds(WeightsCommand, command_id=ints, phase=st.sampled_from(WeightsPhase), version=ints, payload=rows),
    st.builds(WeightsReport, command_id=ints, phase=st.sampled_from(WeightsPhase), version=ints,
              error=st.none() | texts, is_shared=st.booleans(), probe_logprobs=float32s),
    st.builds(Draining),
    st.builds(Bye, error=st.none() | texts),
    st.builds(Ack, lease_id=ints),
    st.builds(Watch),
    st.builds(make_status, run=texts, remaining_s=st.none() | floats, alarms=st.lists(texts, max_size=2).map(tuple),
              metrics=st.dictionaries(texts, floats, max_size=3)),
)  # fmt: skip

GROUP = CompletedGroup(
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

LEASE = Lease(
    lease_id=7,
    purpose=Purpose.EVAL,
    prompt_uid="u",
    prompt_token_ids=np.array([5, 256], np.int32),
    reference="42",
    row={"n": 1},
    num_samples=2,
    seed=3,
    temperature=0.5,
    max_tokens=9,
    stop=("</a>",),
    top_p=0.75,
    top_k=4,
    prefix_lengths=np.array([1, 0], np.int32),
    prefix_token_ids=np.array([6], np.int32),
    prefix_behavior_logprobs=np.array([-0.5], np.float32),
    prefix_versions=np.array([3], np.int32),
    prefix_finish_reasons=(FinishReason.STOP, None),
)


def assert_same(left: Message, right: Message) -> None:
    assert type(left) is type(right)
    for field in fields(left):
        ours, theirs = getattr(left, field.name), getattr(right, field.name)
        if isinstance(ours, np.ndarray):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here
        else:
            assert type(ours) is type(theirs)
            assert ours == theirs


def header(message: Message) -> list[Any]:
    return msgpack.unpackb(bytes(encode(message)[0]))


def with_header(parts: Any, frames: list[Any]) -> list[Any]:
    return [msgpack.packb(parts), *frames]


@steady
@given(messages)
def test_every_message_comes_back_as_it_was(message: Message) -> None:
    assert_same(message, decode([bytes(frame) for frame in encode(message)], MAX_BYTES))


def test_a_status_whose_columns_differ_in_length_is_none() -> None:
    with pytest.raises(ValueError, match=r"columns of different lengths \[2, 3\]"):
        make_status(member_states=("idle", "idle"))


@pytest.mark.parametrize("kind", [Hello, Heartbeat])
def test_nobody_lists_more_leases_than_an_actor_can_have(kind: type) -> None:
    many = np.arange(MAX_LISTED + 1, dtype=np.int32)
    message = hello("a") if kind is Hello else heartbeat({})
    most = dict.fromkeys(["held"] if kind is Hello else ["lease_ids", "lease_tokens"], many[:-1])
    frames = encode(replace(message, **most))
    assert_same(decode(frames, MAX_BYTES), replace(message, **most))
    parts = header(message)
    parts[3][0][2] = [len(many)]
    with pytest.raises(WireError, match="4097 lease ids, more than the 4096"):
        decode(with_header(parts, [many.tobytes(), *encode(message)[2:]]), MAX_BYTES)


@pytest.mark.parametrize("secret", ["", "0" * 31, "0" * 33, "G" * 32, "\u0661" * 32, "0" * 32 + "\n"])
def test_a_greeting_without_a_secret_of_its_length_is_none_and_no_secret_is_quoted(secret: str) -> None:
    message = hello("a")
    parts = header(message)
    parts[2]["secret"] = secret
    with pytest.raises(WireError, match=r"a secret of \d+ characters that is no 32 hexadecimal digits") as caught:
        decode(with_header(parts, encode(message)[1:]), MAX_BYTES)
    assert not secret or secret not in str(caught.value)
    assert message.secret not in repr(message)


# Ids, versions, fingerprints and secrets are compared with what the learner knows, a capacity is cut: none is summed or
# quoted.
COMPARED = {
    *(f"Hello.{name}" for name in ("protocol_version", "model_fingerprint", "tokenizer_fingerprint", "name")),
    *(f"Hello.{name}" for name in ("run_id", "incarnation", "number", "capacity", "secret")),
    *(f"{kind}.lease_id" for kind in ("Progress", "CompletedGroup", "LeaseFailed")),
    *(f"WeightsReport.{name}" for name in ("command_id", "version")),
    "Ready.version",
}


def test_every_number_and_text_of_an_actors_message_has_a_limit() -> None:
    unlimited = set()
    for kind in get_args(ActorMessage):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            plain = () if get_origin(hint) is Annotated else (hint, *get_args(hint))
            if {int, float, str} & set(plain):
                unlimited.add(f"{kind.__name__}.{name}")
    assert unlimited == COMPARED


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("busy_s", "uptime_s") for value in (1.7e308, MAX_SECONDS * 1.01, -1.0)),
        *(("generated_tokens", value) for value in (MAX_COUNT + 1, -1)),
    ],
)
def test_what_no_actor_can_have_counted_is_refused_on_arrival(name: str, value: float) -> None:
    """The sum over two of them would be infinite."""
    parts = header(heartbeat({3: 4}, 5, 6.0, 7.0))
    parts[2][name] = value
    with pytest.raises(WireError, match=f"Heartbeat.{name} must be from 0 to"):
        decode(with_header(parts, encode(heartbeat({3: 4}))[1:]), MAX_BYTES)


@pytest.mark.parametrize("tokens", [[1, -1], [1], [1, 2, 3]])
def test_a_heartbeat_says_of_each_lease_how_many_tokens_it_has(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=r"2 leases with the tokens \["):
        replace(heartbeat({3: 4, 5: 6}), lease_tokens=np.array(tokens, np.int32))


def test_a_text_that_is_too_long_or_cannot_be_written_is_cut_on_arrival_and_travels_on() -> None:
    """A failed lease's reason is quoted when its actor is dismissed: that must fit into a message as well."""
    parts = header(LeaseFailed(lease_id=1, reason=""))
    parts[2]["reason"] = "\U0001f600" * (MAX_HEADER_BYTES // 4 - 100)
    failed = decode(with_header(parts, []), MAX_HEADER_BYTES)
    assert isinstance(failed, LeaseFailed)
    assert failed.reason == "\U0001f600" * (MAX_TEXT - 3) + "..."
    whole = "x" * (MAX_TEXT - 1) + "\ud800"
    for reason, told in ((failed.reason + "!", failed.reason[: MAX_TEXT - 3] + "..."), (whole, whole[:-1] + "?")):
        refused = decode([bytes(frame) for frame in encode(Refused(reason=reason, fatal=True))], MAX_BYTES)
        assert refused == Refused(reason=told, fatal=True)


def test_an_error_quotes_little_of_what_a_stranger_sent() -> None:
    parts = header(WeightsCommand(command_id=1, phase=WeightsPhase.UPDATE, version=1, payload={}))
    parts[2]["payload"] = {"\x7f" * 1_000_000: {"x" * 1_000_000: 2**63}}
    with pytest.raises(WireError, match="more than 64 bits") as caught:
        decode(with_header(parts, []), MAX_HEADER_BYTES)
    assert len(str(caught.value)) < 300


def test_the_bytes_of_a_small_message_never_change_within_a_protocol_version() -> None:
    assert encode(Ack(lease_id=7)) == [b"\x94\xa3Ack\x06\x81\xa8lease_id\x07\x90"]


def test_the_bytes_of_a_group_never_change_within_a_protocol_version() -> None:
    frames = [bytes(frame) for frame in encode(GROUP)]
    assert frames[0] == (
        b"\x94\xaeCompletedGroup\x06\x86\xa8lease_id\x07"
        b"\xa8verdicts\x92\xa7correct\xa9timed_out\xaeverifier_error\xc0\xaefinish_reasons\x92\xa4stop\xa6length"
        b"\xacgeneration_s\xcb\x3f\xf8\0\0\0\0\0\0\xaeverification_s\xcb\x3f\xd0\0\0\0\0\0\0"
        b"\x95\x93\xa7lengths\xa5int32\x91\x02\x93\xa9token_ids\xa5int32\x91\x03"
        b"\x93\xb1behavior_logprobs\xa7float32\x91\x03\x93\xa8versions\xa5int32\x91\x03\x93\xa7rewards\xa7float32\x91\x02"
    )
    assert frames[1:] == [
        b"\x01\0\0\0\x02\0\0\0",
        b"\x05\0\0\0\x06\0\0\0\0\x01\0\0",
        b"\0\0\0\xbf\0\0\0\0\0\0\x80\xbf",
        b"\x03\0\0\0\x03\0\0\0\x04\0\0\0",
        b"\0\0\x80\x3f\0\0\x80\xbf",
    ]


def test_the_bytes_of_a_lease_never_change_within_a_protocol_version() -> None:
    assert [bytes(frame) for frame in encode(LEASE)] == [
        b"\x94\xa5Lease\x06\x8d\xa8lease_id\x07\xa7purpose\xa4eval\xaaprompt_uid\xa1u\xa9reference\xa242"
        b"\xa3row\x81\xa1n\x01\xabnum_samples\x02\xa4seed\x03\xabtemperature\xcb\x3f\xe0\0\0\0\0\0\0"
        b"\xaamax_tokens\x09\xa4stop\x91\xa4</a>\xa5top_p\xcb\x3f\xe8\0\0\0\0\0\0\xa5top_k\x04"
        b"\xb5prefix_finish_reasons\x92\xa4stop\xc0"
        b"\x95\x93\xb0prompt_token_ids\xa5int32\x91\x02\x93\xaeprefix_lengths\xa5int32\x91\x02"
        b"\x93\xb0prefix_token_ids\xa5int32\x91\x01\x93\xb8prefix_behavior_logprobs\xa7float32\x91\x01"
        b"\x93\xafprefix_versions\xa5int32\x91\x01",
        b"\x05\0\0\0\0\x01\0\0",
        b"\x01\0\0\0\0\0\0\0",
        b"\x06\0\0\0",
        b"\0\0\0\xbf",
        b"\x03\0\0\0",
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefix_lengths": np.array([1, 1], np.int32)}, r"the lengths \[1, 1\] sum to 2 over 2 completions, but it"),
        ({"prefix_lengths": np.array([2, -1], np.int32)}, r"the lengths \[2, -1\] sum to 1"),
        ({"prefix_lengths": np.array([1], np.int32)}, "1 prefixes for 2 completions"),
        ({"prefix_finish_reasons": ()}, "0 finish reasons for 2 prefixes"),
    ],
)
def test_a_prefix_that_does_not_add_up_is_no_lease(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(LEASE, **changes)


@pytest.mark.parametrize("changes", [{"starts": [0]}, {"starts": [0, -1]}, {"lengths": [1, 1]}, {"lengths": [2, -1]}])
def test_progress_that_does_not_add_up_is_refused(changes: dict[str, list[int]]) -> None:
    arrays = {name: np.array(value, np.int32) for name, value in changes.items()}
    with pytest.raises(ValueError, match="progress of lease 7: "):
        replace(progress(7, [0, 0], [[5], []]), **arrays)


def test_arrays_are_sent_and_received_without_a_copy() -> None:
    frames = encode(GROUP)
    assert np.shares_memory(np.frombuffer(frames[2], np.uint8), GROUP.token_ids)
    received = [bytes(frame) for frame in frames]
    decoded = decode(received, MAX_BYTES)
    assert isinstance(decoded, CompletedGroup)
    assert np.shares_memory(np.frombuffer(received[2], np.uint8), decoded.token_ids)
    assert not decoded.token_ids.flags.writeable


def test_a_frame_at_an_odd_address_becomes_an_aligned_array() -> None:
    frames = encode(GROUP)
    odd = memoryview(b"\0" + bytes(frames[2]))[1:]
    decoded = decode([frames[0], frames[1], odd, *frames[3:]], MAX_BYTES)
    assert isinstance(decoded, CompletedGroup)
    assert decoded.token_ids.flags.aligned
    np.testing.assert_array_equal(decoded.token_ids, GROUP.token_ids)


@steady
@given(st.lists(st.binary(max_size=200), max_size=7))
def test_arbitrary_bytes_are_a_message_or_a_wire_error(frames: list[bytes]) -> None:
    with contextlib.suppress(WireError):
        assert isinstance(decode(frames, MAX_BYTES), get_args(Message))


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=9)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)  # fmt: skip


@settings(steady, max_examples=300)
@given(message=messages, data=st.data())
def test_a_header_with_anything_in_any_place_is_a_message_or_a_wire_error(
    message: Message, data: st.DataObject
) -> None:
    parts, frames = header(message), encode(message)[1:]
    place = data.draw(st.integers(0, 3))
    if place == 2 and parts[2]:
        parts[2][data.draw(st.sampled_from(sorted(parts[2])))] = data.draw(anything)
    elif place == 3 and parts[3]:
        spec = parts[3][data.draw(st.integers(0, len(parts[3]) - 1))]
        spec[data.draw(st.integers(0, 2))] = data.draw(anything)
    else:
        parts[place] = data.draw(anything)
    try:
        decoded = decode(with_header(parts, frames), MAX_BYTES)
    except WireError:
        return
    assert_same(decoded, decode(encode(decoded), MAX_BYTES))


@steady
@given(message=messages, data=st.data())
def test_a_message_cut_anywhere_is_a_wire_error(message: Message, data: st.DataObject) -> None:
    frames = [bytes(frame) for frame in encode(message)]
    index = data.draw(st.integers(0, len(frames) - 1))
    if frames[index]:
        frames[index] = frames[index][: data.draw(st.integers(0, len(frames[index]) - 1))]
    else:
        del frames[index]
    with pytest.raises(WireError):
        decode(frames, MAX_BYTES)


def changed(place: int, value: Any) -> list[Any]:
    parts = header(GROUP)
    parts[place] = value
    return parts


def field_changed(name: str, value: Any) -> list[Any]:
    return changed(2, header(GROUP)[2] | {name: value})


def spec_changed(**changes: Any) -> list[Any]:
    specs = header(GROUP)[3]
    specs[1] = [changes.get("name", "token_ids"), changes.get("dtype", "int32"), changes.get("shape", [3])]
    return changed(3, specs)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (changed(0, "Surprise"), "unknown kind of message: 'Surprise'"),
        (changed(0, "Prompt"), "unknown kind"),  # a record, but not a message
        (changed(1, PROTOCOL_VERSION + 1), f"protocol version {PROTOCOL_VERSION + 1}, but this side speaks"),
        (changed(1, True), "protocol version True"),
        (changed(2, {"lease_id": 1}), "lacks the fields"),
        (field_changed("extra", 1), "unknown fields"),
        (field_changed("lease_id", "7"), "CompletedGroup.lease_id must be"),
        (field_changed("lease_id", True), "CompletedGroup.lease_id must be"),
        (field_changed("lease_id", 7.0), "CompletedGroup.lease_id must be"),
        (field_changed("lease_id", 2**63), "more than 64 bits"),
        (field_changed("generation_s", math.nan), "must be finite"),
        (field_changed("verdicts", ["correct", "perhaps"]), "CompletedGroup.verdicts must be"),
        (field_changed("verdicts", ["correct"]), "1 rewards, verdicts|verdicts"),
        (spec_changed(dtype="float64"), "must be announced as int32"),
        (spec_changed(dtype="object"), "must be announced as int32"),
        (spec_changed(name="rewards"), "token_ids must be announced"),
        (spec_changed(shape=[4]), "does not fit its frame of 12 bytes"),
        (spec_changed(shape=[3, 1]), "1 dimension"),
        (spec_changed(shape=[-3]), "1 dimension"),
        (spec_changed(shape=[2**62]), "does not fit"),
        (changed(3, []), "5 arrays, not 0 specs"),
    ],
)
def test_a_wrong_header_is_refused_with_a_sentence(parts: list[Any], sentence: str) -> None:
    with pytest.raises(WireError, match=sentence):
        decode(with_header(parts, encode(GROUP)[1:]), MAX_BYTES)


def test_lengths_that_do_not_add_up_are_refused() -> None:
    frames = encode(GROUP)
    frames[1] = np.array([1, 1], np.int32).tobytes()
    with pytest.raises(WireError, match="lengths sum to 2 over 2 completions"):
        decode(frames, MAX_BYTES)


def test_an_oversized_message_is_refused_before_it_is_read() -> None:
    frames = encode(GROUP)
    size = sum(len(frame) for frame in frames)
    decode(frames, size)
    with pytest.raises(WireError, match=f"a message of {size} bytes"):
        decode(frames, size - 1)
    with pytest.raises(WireError, match="the limits are"):
        decode([b"\0" * (MAX_HEADER_BYTES + 1)], 1 << 30)


def test_a_row_that_is_too_deep_or_no_json_does_not_travel() -> None:
    nested: Any = 1
    for _ in range(MAX_JSON_DEPTH + 1):
        nested = [nested]
    command = {"command_id": 1, "phase": WeightsPhase.UPDATE, "version": 1}
    with pytest.raises(WireError, match=r"WeightsCommand.payload\['a'\] is nested deeper"):
        encode(WeightsCommand(payload={"a": nested}, **command))
    for value in (b"bytes", {1: "x"}, {1, 2}, np.int64(3), 2**70, "\ud800"):
        with pytest.raises(WireError):
            encode(WeightsCommand(payload={"a": value}, **command))


def test_a_wrong_array_does_not_travel() -> None:
    with pytest.raises(WireError, match=r"Ready\.probe_logprobs must be float32 of 1 dimension"):
        encode(Ready(version=0, probe_logprobs=np.zeros(3)))
