"""How an actor and its learner come to know each other, and find each other again.

The actor says Hello when it starts, and the answer is Welcome or Refused. It says Hello again on every connection,
since what was on its way over the one before is lost: on one that libzmq has made again by itself, and on one that the
actor makes when the learner was not heard for a while, because the old one may be half open, or the learner at another
address. And it does so when the learner asks for it (SayHello), because it was started again, has lost sight of the
actor, or misses something of it.
"""

import logging
import secrets
import time
from collections.abc import Callable, Iterable

import numpy as np

from common.agreement import agreed, agreed_again
from common.config import Config, ConfigError
from common.transport import ActorConnection, ConnectionRenewed, model_fingerprints
from common.types import PROTOCOL_VERSION, Hello, LearnerMessage, Refused, SayHello, Stop, Welcome

logger = logging.getLogger(__name__)


class ActorError(RuntimeError):
    """Why this actor has to leave; one sentence."""


class LearnerStops(Exception):
    """The run is over before this actor has joined; the learner's reason."""


class Session:
    """What the actor knows of its learner. `welcome` is the last that was accepted, and `config` agrees with it.

    `locate` says at which endpoint it is by now; None: where it was.
    """

    def __init__(self, config: Config, connection: ActorConnection, locate: Callable[[], str] | None = None) -> None:
        self.config = config
        self.welcome: Welcome
        self.connection = connection
        self._locate = locate or (lambda: connection.endpoint)
        self._fingerprints = ("", "")
        self._secret = secrets.token_hex(16)
        self._greeted_s = float("-inf")

    async def begin(self) -> Config:
        """Joins. The configuration, with the learner's settings in it.

        Raises LearnerStops, ActorError, ConfigError when the actor does not fit, or TimeoutError when the learner does
        not answer.
        """
        self._fingerprints = model_fingerprints(self.config.model.path)
        match await self._first_answer():
            case Welcome() as welcome:
                self.config = agreed(self.config, welcome.settings)
                self.welcome = welcome
                return self.config
            case Refused(reason=reason):
                raise ActorError(f"the learner refused this actor: {reason}")
            case Stop(reason=reason):
                raise LearnerStops(reason)
            case other:
                raise ActorError(f"the learner answered the greeting with {type(other).__name__}")

    async def _first_answer(self) -> LearnerMessage:
        """To the greeting, which is repeated on every connection, and on a new one after each silence: a learner that
        is just being started again may have lost it, or be elsewhere by now. Raises TimeoutError."""
        began_s, patience_s = time.monotonic(), self.config.actors.start_timeout_s
        silence_s = self.config.transport.heartbeat_timeout_s
        while True:
            await self._greet(None, (), ())
            remaining_s = max(0.0, began_s + patience_s - time.monotonic())
            try:
                return await self.connection.receive(min(silence_s, remaining_s))
            except ConnectionRenewed:
                continue
            except TimeoutError:
                place = f"the learner at {self.connection.endpoint}"
                if remaining_s <= silence_s:
                    raise TimeoutError(
                        f"{self.connection.name!r} heard nothing from {place} for {patience_s:g} s "
                        "(actors.start_timeout_s)"
                    ) from None
                logger.warning("%s does not answer within %g s: a new connection", place, silence_s)
                self.connection.reopen(self._locate())

    async def receive(self, held: Iterable[int], finished: Iterable[int]) -> LearnerMessage:
        """The next message. Greets again where that is called for, with the leases `held` and the groups `finished`.

        Raises TimeoutError when nothing was heard for transport.reconnect_s.
        """
        heard_s, patience_s = time.monotonic(), self.config.transport.reconnect_s
        while True:
            remaining_s = heard_s + max(patience_s, self.welcome.timeout_s) - time.monotonic()
            try:
                message = await self.connection.receive(min(self.welcome.timeout_s, max(0.0, remaining_s)))
            except ConnectionRenewed:
                logger.warning("the connection to the learner was interrupted")
                await self._greet(self.welcome, held, finished)
                continue
            except TimeoutError:
                if remaining_s <= self.welcome.timeout_s:
                    raise TimeoutError(
                        f"{self.connection.name!r} heard nothing from the learner at {self.connection.endpoint} for "
                        f"{time.monotonic() - heard_s:.0f} s (transport.reconnect_s={patience_s:g})"
                    ) from None
                logger.warning("the learner was not heard for %g s: a new connection", self.welcome.timeout_s)
                self.connection.reopen(self._locate())
                await self._greet(self.welcome, held, finished)
                continue
            if isinstance(message, SayHello) and time.monotonic() - self._greeted_s > self.welcome.heartbeat_s:
                logger.warning("the learner asks for a greeting: %s", message.reason)
                await self._greet(self.welcome, held, finished)
            return message

    def accept(self, welcome: Welcome) -> bool:
        """Whether the learner has been started again since the last Welcome.

        Raises ActorError when it trains another run now, or when it wants what only a new start of the actor can give.
        """
        if welcome.run_id != self.welcome.run_id:
            raise ActorError(
                f"the learner at {self.connection.endpoint} trains another run now ({welcome.run_id}, not "
                f"{self.welcome.run_id}): start this actor again"
            )
        is_restarted = welcome.incarnation != self.welcome.incarnation
        if is_restarted:
            try:
                self.config = agreed_again(self.config, welcome.settings)
            except ConfigError as error:
                raise ActorError(str(error)) from error
        self.welcome = welcome
        return is_restarted

    async def _greet(self, welcome: Welcome | None, held: Iterable[int], finished: Iterable[int]) -> None:
        self._greeted_s = time.monotonic()
        model, tokenizer = self._fingerprints
        await self.connection.send(
            Hello(
                protocol_version=PROTOCOL_VERSION,
                name=self.connection.name,
                secret=self._secret,
                capacity=self.config.actors.groups_in_flight,
                model_fingerprint=model,
                tokenizer_fingerprint=tokenizer,
                run_id=None if welcome is None else welcome.run_id,
                incarnation=None if welcome is None else welcome.incarnation,
                number=None if welcome is None else welcome.number,
                held=np.array(list(held), dtype=np.int32),
                finished=np.array(list(finished), dtype=np.int32),
            )
        )
