"""A plug-in verifier that may be interrupted: the pool's ordinary one, and answers that are not interrupted easily."""

import json
from typing import Any

import verifier_plugins
from verifier_plugins import warm_up as warm_up

from actors.verifier.limits import take_time
from common.types import Verdict

INTERRUPTIBLE = (__name__, "verifier_plugins")

_judged: list[str] = []  # by this process


def behave(response: str, reference: str, row: dict[str, Any]) -> Verdict:
    _judged.append(response)
    match response:
        case "interrupted before":
            return Verdict.CORRECT if any(before.startswith("hang") for before in _judged) else Verdict.WRONG
        case "hang elsewhere":
            json.loads("[1]", parse_int=_hang)
        case "swallow":
            while True:
                try:
                    _hang()
                except BaseException:
                    return Verdict.CORRECT
        case "swallow and go on":
            while True:
                try:
                    _hang()
                except BaseException:
                    continue
        case "work long":
            take_time()
            return verifier_plugins.behave("work", reference, row)
        case "hang in C":
            return Verdict.CORRECT if sum(range(10**13)) else Verdict.WRONG
    return verifier_plugins.behave(response, reference, row)


def _hang(*_: object) -> None:
    while True:
        pass
