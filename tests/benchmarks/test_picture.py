"""A picture for a document: a whole SVG file with its colours, of the plot that was asked for."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import picture
from tests.support.made_up_run import write_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "made")


@pytest.mark.parametrize("number", range(1, 16))
def test_a_view_is_written_as_a_file_that_needs_nothing_else(
    number: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pictures" / "view.svg"
    monkeypatch.setattr(sys, "argv", ["picture.py", str(folder), "--view", str(number), "--out", str(file)])
    picture.main()
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and float(root.attrib["width"]) > 400
    style = root.findtext("{http://www.w3.org/2000/svg}style") or ""
    named = {name for part in root.iter() for name in part.attrib.get("class", "").split()}
    assert [name for name in named if re.fullmatch(r"[ach]\d", name) and f".{name} {{" not in style] == []
    assert "prefers-color-scheme: dark" in style and "url(" not in style and "<title>" not in file.read_text()


def test_a_plot_that_the_run_does_not_have_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in ((["--view", "16"], "--view 16"), (["--view", "1", "--panel", "7"], "--panel 7")):
        monkeypatch.setattr(sys, "argv", ["picture.py", str(folder), *words, "--out", str(tmp_path / "view.svg")])
        with pytest.raises(SystemExit):
            picture.main()
        assert sentence in capsys.readouterr().err
