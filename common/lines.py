"""Lines of a label and a text, where a person reads them: broken at spaces, and continued below the text."""

import shutil
import sys
import textwrap


def for_terminal(text: str, indent: int) -> str:
    """`text` for standard output; as it is where that is no terminal, so that for other programs a line stays one.

    `indent` is the number of columns before what belongs to a label.
    """
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "\n".join(broken(line, width, indent) for line in text.splitlines())


def broken(line: str, width: int, indent: int) -> str:
    """`line` in as many as it takes; a word that is longer than the space for it stays whole, for paths are copied."""
    if len(line) <= width:
        return line
    parts = textwrap.wrap(
        line, max(width, indent + 1), subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(parts)
