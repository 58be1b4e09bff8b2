"""What `train` writes to its terminal: what the learner and the supervisor say and, below that, how the run stands.

The lower part is drawn by the supervisor's only thread, between its waits, from the RunStatus that `run.py top` shows
too: it asks the learner for it as any observer does (common/observer.py). While it is seen, the learner's line a step
is left out, which RUN/logs has. Where it cannot be drawn, or the learner refuses to be asked, there are only lines.
"""

import math
import sys
import time

from rich.text import Text

from common.config import Config, ConfigError, ConsoleStyle
from common.dashboard import SILENT_S, clock, dashboard
from common.keys import actor_keys
from common.metrics import is_progress
from common.observer import NAME, Observer, RunOver, endpoint_of
from common.region import Region, can_draw
from common.types import RunStatus
from common.wire import WireError

DRAW_S = 1.0


def console_for(config: Config) -> "Console":
    """What fits the terminal, and the run: nobody can be asked about a replay."""
    is_live = config.logging.console is ConsoleStyle.auto and config.learner.replay is None and can_draw()
    return LiveConsole(config) if is_live else Console()


class Console:
    """Lines as they come. Every method may raise BrokenPipeError: the reader went away."""

    draw_at = math.inf  # monotonic, when `draw` has something to do

    def write(self, piece: bytes) -> None:
        """Output of the learner, or a part of it."""
        sys.stdout.buffer.write(piece)
        sys.stdout.flush()

    def say(self, line: str) -> None:
        """A line of the supervisor's, on standard error."""
        print(line, file=sys.stderr, flush=True)

    def draw(self, now: float) -> None:
        """How the run stands at `now` (monotonic)."""

    def close(self) -> None:
        """Nothing is drawn any more."""


class LiveConsole(Console):
    """The same, with how the run stands below."""

    def __init__(self, config: Config) -> None:
        self._name = config.name
        self._region = Region()
        self._observer: Observer | None = Observer(
            lambda: endpoint_of(config.run_dir), lambda: actor_keys(config, NAME), config.transport.max_message_mb
        )
        self._status: RunStatus | None = None
        self._silent_s = 0.0
        self._began_s = self.draw_at = time.monotonic()
        self._stage = "learner and actors are starting"  # while there is no status
        self._part = b""  # of a line that is not complete yet
        self._hidden = b""  # the last line of a step, if it was left out

    def write(self, piece: bytes) -> None:
        *lines, self._part = (self._part + piece).split(b"\n")
        if shown := [line + b"\n" for line in lines if not self._hides(line)]:
            with self._region.lifted():
                super().write(b"".join(shown))

    def say(self, line: str) -> None:
        with self._region.lifted():
            super().say(line)

    def draw(self, now: float) -> None:
        if now < self.draw_at:
            return
        self.draw_at = now + DRAW_S
        try:
            if self._observer is not None:
                self._status, self._silent_s = self._observer.look(now), now - self._observer.heard_s
        except RunOver as end:
            self._hang_up()
            self._stage = f"ends: {end}"
        except (ConfigError, WireError) as error:
            self.close()
            self.say(f"warning: a line a step is all that is shown ({error})")
            return
        width, height = self._region.size
        if self._status is not None:
            self._region.draw(dashboard(self._status, width, height, self._silent_s))
        else:
            line = f"{self._name}  {self._stage}  {clock(now - self._began_s)}"
            self._region.draw(Text(line, no_wrap=True, overflow="ellipsis"))

    def close(self) -> None:
        self._region.erase()
        if left := self._hidden + self._part:
            super().write(left)
        self._hidden = self._part = b""
        self._hang_up()
        self.draw_at = math.inf

    def _hides(self, line: bytes) -> bool:
        """Lines of steps, while it is seen without them how the run stands."""
        if not is_progress(line.decode(errors="replace")):
            return False
        is_seen = self._status is not None and self._silent_s <= SILENT_S
        self._hidden = line + b"\n" if is_seen else b""
        return is_seen

    def _hang_up(self) -> None:
        if self._observer is not None:
            self._observer.close()
        self._observer = self._status = None
