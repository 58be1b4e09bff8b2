"""The mathematical verifier may be interrupted anywhere outside sympy, and says afterwards what it said before."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.verifier_cases import CLASSES, DIFFERENT

# In a process of its own, because the time limits take SIGALRM. Interrupted in sympy a worker is replaced: not here.
SCRIPT = """
import json, random, sys
from actors.verifier import probing
from actors.verifier.math import answers_equal
from actors.verifier.plugin import load_verifier
from actors.verifier.limits import Interrupted, Limits

probing.proves_zero = lambda node: False
pairs, verifier, limits = json.load(sys.stdin), load_verifier("actors.verifier.math:verify", 1.0), Limits()
generator, interruptions = random.Random(0), []
before = [answers_equal(a, b) for a, b in pairs[::2]]
for a, b in pairs * 8:
    try:
        limits.start(generator.uniform(0.00005, 0.001), 60.0, False)
        answers_equal(a, b)
        limits.stop()
    except Interrupted as interruption:
        limits.is_judging = False
        interruptions.append(verifier.survives(interruption.__traceback__.tb_next))
after = [answers_equal(a, b) for a, b in pairs]
print(json.dumps([before == after[::2], after, len(interruptions), sum(interruptions)]))
"""


@pytest.mark.timeout(120)
def test_verdicts_after_a_thousand_interruptions_are_right() -> None:
    pairs = [(a, b, True) for spellings in CLASSES for a, b in pairwise(spellings)]
    pairs += [(a, b, False) for a, b in DIFFERENT]
    random.Random(1).shuffle(pairs)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([(a, b) for a, b, _ in pairs]),
        capture_output=True,
        text=True,
        check=True,
        timeout=110,
        cwd=Path(__file__).resolve().parents[3],
    )
    is_same, after, num_interruptions, num_survived = json.loads(done.stdout)
    needs_sympy = {k for k, (_, _, is_equal) in enumerate(pairs) if is_equal and not after[k]}
    assert is_same
    assert [k for k, (_, _, is_equal) in enumerate(pairs) if after[k] != is_equal and k not in needs_sympy] == []
    assert len(needs_sympy) < len(pairs) // 50
    assert num_interruptions > 1000
    assert num_survived > 0.99 * num_interruptions
