"""Case files as people write them."""

from pathlib import Path

import pytest

from actors.grade import read_cases
from common.config import ConfigError


def test_a_text_may_hold_any_character_that_json_allows(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(
        '{"gold": "1", "pred": "a\u2028b\x85c"}\r\n\n{"gold": "2", "pred": "2"}', encoding="utf-8", newline=""
    )
    assert [row["pred"] for row in read_cases(path)] == ["a\u2028b\x85c", "2"]


def test_a_line_in_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b'{"gold": "1", "pred": "1"}\n{"gold": "1", "pred": "\xff"}\n')
    with pytest.raises(ConfigError, match=r"^grade: line 2 of .* is not JSON \('utf-8' codec"):
        read_cases(path)
