"""A terminal of a page: what is on the screen, and above it, after the bytes that a program wrote."""

import re

_PART = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b.|[\x00-\x1f]|[^\x00-\x1f\x1b]+")


class Screen:
    """Lines without end instead of a scrollback. Knows what common/region.py uses, and refuses everything else."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines = [""]
        self._row = self._column = 0

    def feed(self, text: str) -> None:
        for part in _PART.finditer(text):
            token = part.group()
            match token, part.group(2):
                case "\r", _:
                    self._column = 0
                case "\n", _:
                    self._to_row(self._row + 1)
                case _, "A":
                    self._row = max(0, self._row - int(part.group(1) or 1))
                case _, "J" if part.group(1) in ("", "0"):
                    self.lines[self._row :] = [self.lines[self._row][: self._column]]
                case _, "K" if part.group(1) in ("", "0"):
                    self.lines[self._row] = self.lines[self._row][: self._column]
                case _, "m":
                    pass
                case _ if token[0] >= " ":
                    for letter in token:
                        self._put(letter)
                case _:
                    raise AssertionError(f"the terminal is told {token!r}")

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")

    def _put(self, letter: str) -> None:
        if self._column == self.width:
            self._column = 0
            self._to_row(self._row + 1)
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[: self._column] + letter + line[self._column + 1 :]
        self._column += 1

    def _to_row(self, row: int) -> None:
        self._row = row
        while len(self.lines) <= row:
            self.lines.append("")
