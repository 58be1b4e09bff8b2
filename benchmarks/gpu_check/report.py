"""What one part of the check found, in a file that is whole after every line: a part that is killed leaves it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

Number = float | str


@dataclass
class Found:
    """The content of a report's file."""

    numbers: dict[str, Number] = field(default_factory=dict)  # in the order in which they were found
    failures: list[str] = field(default_factory=list)  # a sentence each; the part has failed when there is one
    not_run: list[str] = field(default_factory=list)  # a sentence for each thing that could not be tried, and why
    is_complete: bool = False


class Report:
    """The numbers, failures and omissions of one part. A missing or unreadable value is never written down as 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = Found()
        self._write()

    def number(self, name: str, value: Number) -> None:
        """Something measured that is neither right nor wrong; its unit belongs into the name."""
        self.found.numbers[name] = value
        self._write()

    def at_most(self, name: str, value: float, limit: float) -> None:
        """Something measured that is wrong above `limit`, or when it is not a number."""
        self.number(name, value)
        if not value <= limit:
            self.fail(f"{name} is {value:.3g}, allowed is {limit:.3g}")

    def fail(self, sentence: str) -> None:
        self.found.failures.append(sentence)
        self._write()

    def skip(self, sentence: str) -> None:
        self.found.not_run.append(sentence)
        self._write()

    def complete(self) -> None:
        self.found.is_complete = True
        self._write()

    def _write(self) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self.found), indent=1))
        temporary.replace(self.path)


def read(path: Path) -> Found:
    """What a part has written so far; nothing when it did not get to that."""
    return Found(**json.loads(path.read_text())) if path.is_file() else Found()
