"""Keys of CURVE, which encrypts every message and says who sent it: one pair for the learner, others for actors.

    FOLDER/learner.key              public: how actors know the learner
    FOLDER/learner.key_secret       the learner's alone
    FOLDER/actors/NAME.key          public: whose key lies here may take part
    FOLDER/actors/NAME.key_secret   that actor's alone

`run.py keygen FOLDER` makes such a folder. A run without transport.keys makes RUN/keys for itself. An actor uses the
pair of its own name, or else the one named "actor", which any number of actors may share.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import zmq
import zmq.auth

from common.addresses import is_loopback
from common.config import Config, ConfigError, TransportConfig

logger = logging.getLogger(__name__)

SHARED_ACTOR = "actor"
KEY_LENGTH = 40  # characters of Z85
_NAME = re.compile(r"[\w.:-]{1,100}")
NAME_RULE = "must be 1 to 100 letters, digits, or any of _ . : -"  # of an actor's name


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """Public and secret key, 40 characters of Z85 each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class ActorKeys:
    """What an actor needs: its own pair, and the public key of the learner that it will speak to and to no other."""

    own: KeyPair
    learner: bytes
    folder: Path


class LearnerKeys:
    """The learner's own pair, and who may connect: the public keys in FOLDER/actors as they are now.

    A key that is added or removed counts from the next connection on.
    """

    def __init__(self, folder: Path) -> None:
        self.own = _load_pair(folder / "learner.key_secret")
        self._actors = folder / "actors"
        self._files: dict[str, tuple[int, int]] = {}  # name to time of change and size, when they were read
        self._allowed: frozenset[bytes] = frozenset()
        self._read_allowed()
        if not self._allowed:
            raise ConfigError(f"no actor could connect: {self._actors} holds no *.key; make some with `run.py keygen`")

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether the owner of the public key may connect (pyzmq's name for the question)."""
        try:
            self._read_allowed()
        except ConfigError as error:
            logger.error("an actor is refused: %s", error)
            return False
        return key in self._allowed

    def _read_allowed(self) -> None:
        """A file that is no key, such as one that is being copied, allows nobody."""
        try:
            found = {entry.name: entry.stat() for entry in os.scandir(self._actors) if entry.name.endswith(".key")}
        except OSError as error:
            raise ConfigError(f"the keys in {self._actors} cannot be read ({error})") from error
        files = {name: (status.st_mtime_ns, status.st_size) for name, status in found.items()}
        if files == self._files:
            return
        allowed = set()
        for name in files:
            try:
                allowed.add(_load(self._actors / name)[0])
            except ConfigError as error:
                logger.warning("%s", error)
        self._files, self._allowed = files, frozenset(allowed)


def is_actor_name(name: str) -> bool:
    """Whether it keeps to NAME_RULE."""
    return _NAME.fullmatch(name) is not None


def make_keys(folder: Path, actors: Sequence[str] = (SHARED_ACTOR,)) -> list[Path]:
    """Makes what is missing of a learner's pair and the pairs of these actors; the secret files that are new.

    Nothing that is there is replaced, so a second call adds actors. Raises ConfigError for a name that is none, and
    when the folder cannot be written.
    """
    require_curve()
    for name in actors:
        if not is_actor_name(name):
            raise ConfigError(f"--actor {name!r} {NAME_RULE}")
    wanted = [folder / "learner", *(folder / "actors" / name for name in actors)]
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "actors").mkdir(mode=0o700, exist_ok=True)
        missing = [path for path in wanted if not _secret(path).is_file()]
        for path in missing:
            _make_pair(path)
    except OSError as error:
        raise ConfigError(f"keys cannot be made in {folder} ({error}): name a folder that can be written") from error
    return [_secret(path) for path in missing]


def learner_keys(config: Config) -> LearnerKeys | None:
    """Those in transport.keys, or in RUN/keys, which are made when they are not there; None with transport.curve=off.

    Raises ConfigError when there is no CURVE here, or a file is missing.
    """
    if not config.transport.curve:
        return None
    require_curve()
    if config.transport.keys is None:
        make_keys(config.run_dir / "keys")
    return LearnerKeys(keys_folder(config))


def check_keys(config: Config) -> None:
    """Raises ConfigError when learner_keys would, before a run begins."""
    if config.transport.curve:
        require_curve()
        if config.transport.keys is not None:
            LearnerKeys(Path(config.transport.keys))


def actor_keys(config: Config, name: str, folder: Path | None = None) -> ActorKeys | None:
    """The keys of the actor `name` in `folder`, else where its configuration has them; None with transport.curve=off.

    Raises ConfigError when there is no CURVE here, or a file is missing.
    """
    if not config.transport.curve:
        return None
    require_curve()
    folder = folder or keys_folder(config)
    if not folder.is_dir():
        raise ConfigError(
            f"actor {name} has no keys, {folder} is not there: give --keys a copy of the learner's (RUN/keys, or its "
            "transport.keys), or set transport.curve=off on both sides"
        )
    own = folder / "actors" / name
    pair = _load_pair(_secret(own if _secret(own).is_file() else folder / "actors" / SHARED_ACTOR))
    return ActorKeys(own=pair, learner=_load(folder / "learner.key")[0], folder=folder)


def keys_folder(config: Config) -> Path:
    """Where a run's keys are."""
    return config.run_dir / "keys" if config.transport.keys is None else Path(config.transport.keys)


def refuse_open(transport: TransportConfig, keys: LearnerKeys | None) -> None:
    """Raises ConfigError when anybody in the network could take part, unless transport.curve=off asks for that."""
    if keys is None and transport.curve and not is_loopback(transport.host):
        raise ConfigError(
            f"transport.host={transport.host} can be reached from other hosts, and there are no keys: whoever reaches "
            "it could take part. Make keys with `run.py keygen FOLDER` and set transport.keys=FOLDER, or set "
            "transport.curve=off if everybody in that network is trusted"
        )


def require_curve() -> None:
    """Raises ConfigError where ZeroMQ was built without libsodium."""
    if not zmq.has("curve"):
        raise ConfigError(
            f"the ZeroMQ library here ({zmq.zmq_version()}) has no CURVE, so messages cannot be encrypted: install "
            "pyzmq from its wheels, or set transport.curve=off in a network that is trusted"
        )


def _make_pair(path: Path) -> None:
    """path.key and path.key_secret; the secret is never readable by others, and a half-written one has another name."""
    with TemporaryDirectory(prefix=".new-", dir=path.parent) as private:  # mode 0700
        for made in map(Path, zmq.auth.create_certificates(private, path.name)):
            made.chmod(0o600)
            os.replace(made, path.parent / made.name)


def _secret(path: Path) -> Path:
    return path.parent / f"{path.name}.key_secret"


def _load_pair(path: Path) -> KeyPair:
    public, secret = _load(path)
    if secret is None:
        raise ConfigError(f"{path} holds no secret key: make one with `run.py keygen`")
    return KeyPair(public=public, secret=secret)


def _load(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
        if len(public) != KEY_LENGTH or (secret is not None and len(secret) != KEY_LENGTH):
            raise ValueError(f"a key has {KEY_LENGTH} characters")
        return public, secret
    except (OSError, ValueError) as error:
        raise ConfigError(f"the key {path} cannot be read ({error}): make it with `run.py keygen`") from error
