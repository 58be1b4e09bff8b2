"""What is said of simulated actors, or of peers that a measurement ends, is of no use to anybody."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quieter(name: str, level: int = logging.ERROR) -> Iterator[None]:
    """Inside, the loggers of `name` leave out what is below `level`."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
