"""What a verifier function says of one response, whichever way it says it, and how that crosses the pool's pipes."""

import math
import numbers
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from common.types import LARGEST_REWARD, Verdict

CONTRACT = "a Verdict, a bool, a number up to 1e6 in magnitude (the reward) or an object with reward and verdict"
DIED = "ended its process"  # an error: the verifier's code exited or crashed
_NAMES = frozenset(Verdict)
_MAX_CHARS = 300  # of an error


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict and, where the function gave one, the reward; None: the configured reward of the verdict.

    `error` goes with Verdict.ERROR: "raised ...", "returned ..." or DIED.
    """

    verdict: Verdict
    reward: float | None = None
    error: str | None = None


def judgement_of(returned: object, correct_from: float) -> Judgement:
    """The judgement in what a function returned; ERROR for anything but CONTRACT.

    A number is CORRECT from `correct_from` on, else WRONG.
    """
    if isinstance(returned, Verdict):
        return failure("returned Verdict.ERROR") if returned is Verdict.ERROR else Judgement(returned)
    reward, verdict = _parts(_plain(returned))
    if isinstance(verdict, bool):
        verdict = Verdict.CORRECT if verdict else Verdict.WRONG
    elif verdict is None and reward is not None:
        verdict = Verdict.CORRECT if reward >= correct_from else Verdict.WRONG
    if (
        not isinstance(verdict, str)
        or verdict not in _NAMES
        or (reward is not None and not abs(reward) <= LARGEST_REWARD)
    ):
        return failure(f"returned {returned!r} ({type(returned).__name__}), which is not {CONTRACT}")
    if verdict == Verdict.ERROR:
        return failure(f"returned {returned!r}")
    return Judgement(Verdict(verdict), reward)


def raised(error: BaseException, own_frames: int = 1) -> Judgement:
    """ERROR for what a function raised, with the innermost line of the function's own file.

    `own_frames` is how many frames of the traceback are ours, before the function's.
    """
    frames = traceback.extract_tb(error.__traceback__)[own_frames:]
    place = next((frame for frame in reversed(frames) if frame.filename == frames[0].filename), None)
    where = f" ({place.filename.rpartition('/')[2]} line {place.lineno})" if place is not None else ""
    try:
        text = str(error)
    except Exception:  # a mistake in the exception's own class
        text = "(without a text)"
    return failure(f"raised {type(error).__name__}: {text}{where}")


def failure(error: str) -> Judgement:
    """ERROR, with its text on one line, of a length and in characters that travel."""
    text = " ".join(error.encode("utf-8", "replace").decode().split())
    return Judgement(Verdict.ERROR, None, text if len(text) <= _MAX_CHARS else f"{text[: _MAX_CHARS - 3]}...")


def encode(judgement: Judgement) -> bytes:
    """One line without its end: `<verdict> <reward or -> <error>`."""
    reward = "-" if judgement.reward is None else repr(judgement.reward)
    return f"{judgement.verdict} {reward} {judgement.error or ''}".encode()


def decode(line: bytes) -> Judgement:
    verdict, reward, error = line.decode().split(" ", 2)
    return Judgement(Verdict(verdict), None if reward == "-" else float(reward), error or None)


def _plain(value: object) -> object:
    """Python's own number for a scalar of numpy or a tensor without dimensions."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value


def _parts(value: object) -> tuple[float | None, object]:
    """Reward and verdict as far as `value` holds them; NaN for a reward that is no number, or one of two."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return _number(value), None
    if isinstance(value, Mapping):
        parts = (value.get("reward"), value.get("verdict"))
    elif hasattr(value, "reward") and hasattr(value, "verdict"):
        parts = (value.reward, value.verdict)
    else:
        return None, value
    return (math.nan if parts[0] is None or parts[1] is None else _number(_plain(parts[0]))), _plain(parts[1])


def _number(value: object) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
