"""The files of a record: which ones are its steps."""

from pathlib import Path

import pytest

from common.config import ConfigError
from learner.rollouts.record import Record, forget_after

OTHERS = ("step_00000003.bak", "step_3", "step_0000000003", "step_", "step_0000000x", "incomplete", "notes.txt")


def test_what_somebody_else_has_left_beside_the_steps_is_neither_read_nor_removed(tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.mkdir()
    for name in (*OTHERS, "step_00000001", "step_00000002", "step_00000003", "step_123456789"):
        (record / name).touch()
    assert Record(tmp_path).last_step == 3
    forget_after(tmp_path, 2)
    assert sorted(path.name for path in record.iterdir()) == sorted([*OTHERS, "step_00000001", "step_00000002"])
    forget_after(tmp_path, 0)
    with pytest.raises(ConfigError, match="no record of what it trained on"):
        Record(tmp_path)
