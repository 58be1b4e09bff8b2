"""What an actor's configuration must have in common with the learner's, and which of the two gives way.

The learner sends `shared_settings` with its Welcome. An actor takes what it can take before its engine and its
verifier start; what it cannot take (its device, code that it does not have) ends it with one sentence. Models are
compared by their fingerprints (common/transport.py).
"""

import hashlib
import logging
import operator
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from common.config import Config, ConfigError
from common.tasks import is_own_verifier, verifier_function
from common.types import JSON

logger = logging.getLogger(__name__)

# Used for each lease, so that a learner may also be restarted with others while the actor lives.
REWARDS = (
    "reward.correct",
    "reward.wrong",
    "reward.unanswered",
    "reward.timed_out",
    "reward.overlong_penalty",
    "reward.overlong_buffer",
)
# Read when the verifier or the engine starts.
AT_START = (
    "verifier.timeout_s",
    "verifier.memory_mb",
    "verifier.answer_form",
    "model.dtype",
    "model.max_model_len",
    "rollout.group_size",
    "weights.kv_cache",
    "actors.sleep_while_training",
)
# What the actor's machine has to have.
EQUAL = ("device", "transfer_backend")
FUNCTION, CODE = "verifier.function", "verifier.code"


def shared_settings(config: Config) -> dict[str, JSON]:
    """The settings that must agree, by dotted key, and a digest of the verifier's code."""
    values: dict[str, JSON] = {key: operator.attrgetter(key)(config) for key in (*REWARDS, *AT_START, *EQUAL)}
    values = {key: str(value) if isinstance(value, StrEnum) else value for key, value in values.items()}
    return values | {FUNCTION: verifier_function(config), CODE: _code_digest(config)}


def agreed(config: Config, theirs: Mapping[str, JSON]) -> Config:
    """An actor's configuration with the learner's settings in it, before anything is started.

    Raises ConfigError, which names the key and both values, where the actor cannot take them.
    """
    if shared_settings(config).keys() != theirs.keys():
        others = ", ".join(sorted(shared_settings(config).keys() ^ theirs.keys()))
        raise ConfigError(
            f"the learner has other settings to agree on ({others}): run the same version of the program on both sides"
        )
    function = theirs[FUNCTION]
    if function != verifier_function(config):
        logger.info("%s=%s is the learner's, not %s", FUNCTION, function, verifier_function(config))
        config = replace(config, verifier=replace(config.verifier, function=function))
    ours = shared_settings(config)
    for key in EQUAL:
        if ours[key] != theirs[key]:
            raise ConfigError(
                f"{key}={ours[key]} here, but {theirs[key]} at the learner: start this actor with its own"
            )
    _compare_code(function, ours[CODE], theirs[CODE])
    for key in (*REWARDS, *AT_START):
        if ours[key] != theirs[key]:
            logger.info("%s=%s is the learner's, not %s", key, theirs[key], ours[key])
            config = _with(config, key, theirs[key])
    return config


def agreed_again(config: Config, theirs: Mapping[str, JSON]) -> Config:
    """As `agreed`, for an actor that is running when its learner is started again: only rewards may have changed."""
    ours = shared_settings(config)
    for key in (*AT_START, *EQUAL, FUNCTION):
        if ours[key] != theirs.get(key):
            raise ConfigError(
                f"{key} was {ours[key]} and is {theirs.get(key)} since the learner was started again: start this actor "
                "again too"
            )
    return agreed(config, theirs)


def _compare_code(function: str, ours: str | None, theirs: str | None) -> None:
    """A learner that does not find the code, which only actors need, has nothing to compare."""
    if theirs is not None and ours != theirs:
        here = "is not to be found here" if ours is None else f"is other code here (SHA-256 {ours[:12]})"
        raise ConfigError(
            f"{FUNCTION}={function} {here} than at the learner (SHA-256 {theirs[:12]}): copy its file from there"
        )


def _code_digest(config: Config) -> str | None:
    """SHA-256 of the file that holds a user's verifier, found without running any of it; None for ours, which have the
    program's version, and for what is no file of Python."""
    if is_own_verifier(config):
        return None
    spec: ModuleSpec | None = None
    for part in verifier_function(config).partition(":")[0].split("."):
        spec = PathFinder.find_spec(part, None if spec is None else spec.submodule_search_locations)
        if spec is None:
            return None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        return None
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _with(config: Config, key: str, value: JSON) -> Config:
    """`config` with another value for "section.name"; an enum's is written as its name."""
    section, _, name = key.partition(".")
    there = getattr(config, section)
    kind = type(getattr(there, name))
    changed = replace(there, **{name: kind(value) if issubclass(kind, StrEnum) else value})
    return replace(config, **{section: changed})
