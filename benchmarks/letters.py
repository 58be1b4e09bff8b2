"""A long task without transitions that could be broken: benchmarks/long_task.py.

A response is LENGTH letters of the first K of the alphabet. Each of the K x K pairs of neighbours is worth 1, 0 or -1:
a quarter, a half and a quarter of those with the same first letter, drawn once. The response is right when the sum over
its pairs reaches the target that the prompt names, one of ten. The base model writes letters of a random chain.
"""

import json
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random

from common.types import JSON, Prompt, Verdict

ALPHABET, LEVELS = "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJ"
LENGTH = 240  # letters of a response; a token each
STEP = 15  # between targets
NUM_TRAIN, NUM_HELDOUT = 8000, 256


def letters(k: int) -> str:
    return ALPHABET[:k]


def characters(k: int) -> str:
    return letters(k) + LEVELS + "="


@cache
def worth(k: int) -> dict[str, int]:
    """Of each pair of neighbours."""
    rng, found = Random(f"letters/worth/{k}"), {}
    for first in letters(k):
        seconds = list(letters(k))
        rng.shuffle(seconds)
        found |= {first + second: (i < k // 4) - (i >= k - k // 4) for i, second in enumerate(seconds)}
    return found


def total(text: str, k: int) -> int:
    """The sum over the pairs; what is no pair of letters is worth -1."""
    return sum(worth(k).get(first + second, -1) for first, second in pairwise(text))


@cache
def chain(k: int) -> dict[str, list[float]]:
    """The weights of the next letter after each letter."""
    rng = Random(f"letters/chain/{k}")
    return {letter: [rng.expovariate(1.0) + 0.05 for _ in range(k)] for letter in letters(k)}


def walk(rng: Random, k: int, last: str, length: int) -> str:
    """Letters of the chain after `last`."""
    text = last
    while len(text) <= length:
        text += rng.choices(letters(k), chain(k)[text[-1]])[0]
    return text[1:]


def demonstration(rng: Random, k: int) -> tuple[str, str]:
    """A prompt and a response that is a little too long, so that the model does not learn to stop."""
    prompt = _prompt(rng, k)
    return prompt, walk(rng, k, prompt[-1], LENGTH + 6)


def verify(response: str, reference: str, row: dict[str, JSON]) -> Verdict:
    k, target = row["k"], row["target"]
    assert isinstance(k, int)
    assert isinstance(target, int)
    return Verdict.CORRECT if len(response) == LENGTH and total(response, k) >= target else Verdict.WRONG


@cache
def targets(k: int) -> dict[str, int]:
    """Of the levels: half a step below the mean of the chain's sums for the first."""
    rng = Random(f"letters/mean/{k}")
    mean = sum(total(walk(rng, k, "a", LENGTH), k) for _ in range(300)) / 300
    return {level: round(mean + STEP * (number - 0.5)) for number, level in enumerate(LEVELS)}


def write(folder: Path, k: int) -> list[Prompt]:
    """train.jsonl and heldout.jsonl, which share no prompt; the held-out ones."""
    rng, used = Random(f"letters/prompts/{k}"), set[str]()
    for name, number in (("heldout", NUM_HELDOUT), ("train", NUM_TRAIN)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for prompt in _new(rng, k, used, number):
                target = targets(k)[prompt[0]]
                row = {"prompt": prompt, "answer": str(target), "k": k, "target": target}
                file.write(json.dumps(row) + "\n")
    lines = (folder / "heldout.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [Prompt(uid=str(i), text=row["prompt"], reference=row["answer"], row=row) for i, row in enumerate(rows)]


def _new(rng: Random, k: int, used: set[str], number: int) -> Iterator[str]:
    while number:
        prompt = _prompt(rng, k)
        if prompt not in used:
            used.add(prompt)
            number -= 1
            yield prompt


def _prompt(rng: Random, k: int) -> str:
    return rng.choice(LEVELS) + "=" + "".join(rng.choices(letters(k), k=5))
