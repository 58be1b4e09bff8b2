"""number_walk: walk from one number to another in one-digit moves. The demo's task.

    prompt      47>83=
    response    +956+965+974+983#      then end of sequence

A move is four characters: sign, digit 1..9, two-digit new position. Positions are 0..99 written with two
digits, start and target are 1..90 apart, and a walk has at most 16 moves, so a response has at most 66
tokens, the end included. Only the end is rewarded, and the value of a walk can be read off its last
position.
"""

import re
from dataclasses import dataclass
from random import Random

from common.types import Prompt, Verdict

NAME = "number_walk"
VERIFIER = "common.tasks.number_walk:verify"
CHARACTERS = "0123456789+->=#"
MAX_DISTANCE = 90
NEAR_DISTANCE = 15  # of demonstrations that start near the target
MAX_MOVES = 16
MAX_PROMPT_TOKENS = 6
MAX_RESPONSE_TOKENS = 4 * MAX_MOVES + 1 + 1

_MOVE = re.compile(r"([+-])([1-9])([0-9]{2})")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Two different positions in 0..99."""

    start: int
    target: int

    @property
    def text(self) -> str:
        return f"{self.start:02d}>{self.target:02d}="

    def prompt(self, uid: str) -> Prompt:
        row = {"start": self.start, "target": self.target}
        return Prompt(uid=uid, text=self.text, reference=f"{self.target:02d}", row=row)


def sample_problem(rng: Random, max_distance: int = MAX_DISTANCE) -> Problem:
    """A problem with uniform distance and direction, and a start that is uniform among those that fit."""
    distance = rng.randint(1, max_distance)
    low = rng.randint(0, 99 - distance)
    ends = (low, low + distance)
    start, target = ends if rng.random() < 0.5 else ends[::-1]
    return Problem(start=start, target=target)


def verify(response: str, reference: str, row: dict[str, object]) -> Verdict:
    """CORRECT iff every move is right arithmetic inside 0..99 and the walk ends with `#` on the target.

    UNANSWERED when the last character is not `#` (truncated). Raises ValueError unless `row` holds the integers
    `start` and `target`.
    """
    position, target = _integer(row, "start"), _integer(row, "target")
    if not response.endswith("#"):
        return Verdict.UNANSWERED
    walk = response[:-1]
    if len(walk) % 4 != 0 or len(walk) > 4 * MAX_MOVES:
        return Verdict.WRONG
    for i in range(0, len(walk), 4):
        move = _MOVE.fullmatch(walk[i : i + 4])
        if move is None:
            return Verdict.WRONG
        sign, digit, claimed = move.groups()
        position += int(sign + digit)
        if position != int(claimed):
            return Verdict.WRONG
    return Verdict.CORRECT if position == target else Verdict.WRONG


def _integer(row: dict[str, object], column: str) -> int:
    value = row.get(column)
    if not isinstance(value, int):
        there = ", ".join(sorted(row)) or "none"
        raise ValueError(f"the data has no integers in a column '{column}' (there is: {there})")
    return value


def _step_choices(position: int, direction: int) -> list[int]:
    return [direction * digit for digit in range(1, 10) if 0 <= position + direction * digit <= 99]


def sample_demonstration(
    rng: Random,
    right_direction: float,
    careless_landing: float,
    near_share: float = 0.0,
    *,
    wandering_moves: int = 0,
    max_moves: int = MAX_MOVES,
) -> tuple[str, str]:
    """A (prompt, response) pair; the arithmetic is always right, the way is not.

    Each move goes towards the target with probability `right_direction` and has a uniform digit. Within
    nine of the target the move lands on it exactly, except with probability `careless_landing`, when it is
    drawn like any other. A walk that has not arrived after `max_moves` moves gives up with `#` where it is. A
    share `near_share` of the demonstrations starts at most 15 from the target, which gives landings more weight.

    The first moves, a uniform number of them in 0..`wandering_moves`, wander: they go either way and never
    land on purpose. A model of such walks finds its way from wherever it is, whatever it did before.
    """
    problem = sample_problem(rng, NEAR_DISTANCE if rng.random() < near_share else MAX_DISTANCE)
    position = problem.start
    wandering = rng.randint(0, wandering_moves) if wandering_moves else 0
    moves: list[str] = []
    while position != problem.target and len(moves) < max_moves:
        distance = problem.target - position
        towards = 1 if distance > 0 else -1
        wanders = len(moves) < wandering
        if not wanders and abs(distance) <= 9 and rng.random() >= careless_landing:
            move = distance
        else:
            direction = towards if rng.random() < (0.5 if wanders else right_direction) else -towards
            move = rng.choice(_step_choices(position, direction) or _step_choices(position, -direction))
        position += move
        moves.append(f"{move:+d}{position:02d}")
    return problem.text, "".join(moves) + "#"
