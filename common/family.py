"""The processes below a supervisor: started, listened to, and none of them left behind.

What a supervisor decides is in common/processes.py; this is how it is done.
"""

import math
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from common.child import Child
from common.console import Console
from common.control import CONTROL_VARIABLE, ControlSocket
from common.processtree import Guardian, adopt_orphans, descendants, family, kill, reap_adopted
from common.stopping import ECHO_S, GONE, is_echo, silence, stop_numbers
from common.types import JSON

KILL_S = 4.0  # for SIGKILL to take effect


class Family:
    """All processes of one run, as a context manager that leaves none behind.

    One thread, the main one. Signals (SIGCHLD and those that ask to stop) arrive as bytes on a pipe that `pump` selects
    on beside the output of echoed children and RUN/control, so an exit is seen at once and nothing is polled. The
    console is renewed between two waits.
    Invariant: every process below this one that was not there when the family was made belongs to it. While it is open,
    the process must start no others.

    Args:
        children: lists all that were made so far.
        handle: answers a request on RUN/control. Raises ConfigError for one that is not possible.
        run_dir: where RUN/control will be; None: nobody is listened to.
        console: where echoed children's output goes, and what is said of them.
    """

    def __init__(
        self,
        children: Callable[[], list[Child]],
        handle: Callable[[JSON], JSON],
        run_dir: Path | None,
        console: Console,
    ) -> None:
        self._children = children
        self._handle = handle
        self._run_dir = run_dir
        self._console = console
        self._foreign = {process.pid for process in descendants()}
        self._guardian = Guardian()
        self._protected = set[int]()  # pids that it knows
        self.interrupts: list[int] = []  # of stop_numbers so far (no echo), SIGPIPE for a console that went away
        self._interrupted_at = math.inf  # monotonic, of the first

    def __enter__(self) -> Self:
        adopt_orphans()
        self._guardian.__enter__()
        self._foreign.add(self._guardian.pid)
        self._selector = selectors.DefaultSelector()
        self._listen_to_signals()
        self._control = self._listen_to_others()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._kill_everything()
        finally:
            self._show(self._console.close)
            if self._control is not None:
                self._control.close()
            self._restore_signals()
            self._selector.close()
            self._guardian.__exit__(kind, error, trace)

    def start(self, child: Child, **environment: str) -> None:
        """Start it, for the first time or again, with `environment` on top of its own. Raises CannotStart."""
        if self._control is not None and self._run_dir is not None:
            environment[CONTROL_VARIABLE] = str(self._run_dir.absolute())
        child.start(environment)
        self._guardian.protect(child.popen.pid)
        self._protected.add(child.popen.pid)
        if child.popen.stdout is not None:
            os.set_blocking(child.popen.stdout.fileno(), False)
            self._selector.register(child.popen.stdout, selectors.EVENT_READ, child)

    def pump(self, deadline: float | None) -> None:
        """Wait for a signal, output, a request or the deadline (monotonic); copy output, note interrupts, answer."""
        control_at = math.inf if self._control is None else self._control.tend(time.monotonic())
        deadline = min(math.inf if deadline is None else deadline, self._console.draw_at, control_at)
        timeout_s = None if deadline == math.inf else max(0.0, deadline - time.monotonic())
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Child):
                self._copy_output(key.data)
            elif isinstance(key.fileobj, socket.socket) and self._control is not None:
                self._control.hear(key.fileobj)
            else:
                for number in os.read(key.fd, 4096):
                    self._note(number)
        self._show(lambda: self._console.draw(time.monotonic()))

    def say(self, line: str) -> None:
        """To whoever looks at the console."""
        self._show(lambda: self._console.say(line))

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGCHLD or (self.interrupts and self._is_echo(number, now - self._interrupted_at)):
            return
        self._interrupted_at = min(self._interrupted_at, now)
        self.interrupts.append(number)

    def _is_echo(self, number: int, since_first_s: float) -> bool:
        """Ctrl-C also ends the `tee` of `train | tee`, and a terminal that hangs up can no longer be written to: that
        the console is gone asks for nothing new, and what comes with it is the same request."""
        is_first_from_console = self.interrupts[0] == signal.SIGPIPE
        return (
            number == signal.SIGPIPE
            or (is_first_from_console and since_first_s < ECHO_S)
            or is_echo(number, since_first_s)
        )

    def drain(self, child: Child) -> None:
        """What an ended child had still written."""
        while child.popen.stdout is not None and not child.popen.stdout.closed and self._copy_output(child):
            pass

    def kill_orphans(self) -> None:
        """Kill the descendants that no living child of ours accounts for.

        They are listed before the families of the living: what one of those starts in between is in no list.
        """
        reap_adopted(self._foreign | {child.popen.pid for child in self._children() if child.was_started})
        ended = self._protected - {child.popen.pid for child in self._children() if child.is_running}
        found = descendants(self._foreign)
        spared = family(child.popen.pid for child in self._children() if child.is_running)
        orphans = [process for process in found if process.pid not in spared]
        kill(orphans)
        _, left = psutil.wait_procs(orphans, timeout=KILL_S)
        for pid in () if left else ended:
            self._guardian.forget(pid)
            self._protected.remove(pid)

    def _kill_everything(self) -> None:
        """Kill what is still there, again until nothing is (a process may be forking)."""
        deadline = time.monotonic() + KILL_S
        while alive := descendants(self._foreign):
            kill(alive)
            for child in self._children():
                if child.was_started:
                    child.popen.poll()
            reap_adopted(self._foreign | {child.popen.pid for child in self._children() if child.was_started})
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {[process.pid for process in alive]} survive SIGKILL")
            time.sleep(0.01)  # SIGKILL takes effect asynchronously and adopted processes send no event
        for child in self._children():
            if child.was_started:
                child.popen.wait()
                self.drain(child)
                child.ready_path.unlink(missing_ok=True)
        reap_adopted(self._foreign)

    def _copy_output(self, child: Child) -> bool:
        """One piece of an echoed child's output to console and log; False when there is none now or ever."""
        stream = child.popen.stdout
        assert stream is not None
        try:
            piece = os.read(stream.fileno(), 65536)
        except BlockingIOError:
            return False
        if not piece:
            self._selector.unregister(stream)
            stream.close()
            return False
        try:
            child.log_path.parent.mkdir(exist_ok=True)
            with child.log_path.open("ab") as log:
                log.write(piece)
        except OSError as error:  # the console has it, and a disk that is full ends the run where it matters
            self.say(f"warning: {child.log_path} lacks output ({error.strerror})")
        self._show(lambda: self._console.write(piece))
        return True

    def _show(self, act: Callable[[], None]) -> None:
        """A reader that went away (`train | head`) ends the run like an interrupt."""
        try:
            act()
        except OSError as error:
            if error.errno not in GONE:
                raise
            silence()
            self._note(signal.SIGPIPE)

    def _listen_to_signals(self) -> None:
        """SIGCHLD and what asks to stop become bytes on a pipe from now on."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        numbers = (signal.SIGCHLD, *stop_numbers())
        self._handlers_before = {number: signal.signal(number, lambda number, frame: None) for number in numbers}
        self._selector.register(self._reader, selectors.EVENT_READ)

    def _restore_signals(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._reader)
        os.close(self._writer)

    def _listen_to_others(self) -> ControlSocket | None:
        if self._run_dir is None:
            return None
        try:
            return ControlSocket(self._run_dir, self._selector, self._handle)
        except OSError as error:
            self.say(f"warning: {self._run_dir}/control cannot be made ({error.strerror}): no command reaches this run")
            return None
