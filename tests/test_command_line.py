"""What the command line takes, and how mistakes in it end."""

from pathlib import Path

import pytest

from common.commandline import parse
from run import _keys_beside, main

RECIPE = ["-c", "demo"]
ENDPOINT = ["--connect", "tcp://127.0.0.1:1", "--name", "extra"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", *RECIPE, "seed=1", "name=x"],
        ["train", "seed=1", "name=x", *RECIPE],
        ["train", "seed=1", *RECIPE, "name=x"],
        ["train", "seed=1", *RECIPE, "--overwrite", "name=x"],
        ["train", *RECIPE, "seed=1", "--overwrite", "name=x"],
        ["actor", "seed=1", *ENDPOINT, *RECIPE, "name=x"],
        ["actor", *ENDPOINT[:2], "seed=1", *ENDPOINT[2:], "name=x", *RECIPE],
        ["learner", "seed=1", "--config", "demo", "name=x"],
    ],
)
def test_settings_may_stand_on_either_side_of_an_option_and_keep_their_order(words: list[str]) -> None:
    assert parse(words).overrides == ["seed=1", "name=x"]


def test_the_last_of_two_settings_wins_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "learner.steps=1", *RECIPE, "learner.steps=-1"]) == 2
    assert "learner.steps=-1" in capsys.readouterr().err


def test_what_is_no_setting_is_explained_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "name=x", *RECIPE, "number_walk"]) == 2
    assert capsys.readouterr().err == "error: override 'number_walk' is not of the form section.key=value\n"


@pytest.mark.parametrize(
    "words", [["train", "name=x", *RECIPE, "--fast"], ["export", "runs/x", "--out", "y", "seed=1"]]
)
def test_unknown_options_and_settings_without_a_use_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {words[-1]}" in capsys.readouterr().err


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keygen", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/learner.key_secret\n{folder}/actors/actor.key_secret\n"
    assert main(["keygen", str(folder), "--actor", "a", "--actor", "b"]) == 0
    assert capsys.readouterr().out == f"{folder}/actors/a.key_secret\n{folder}/actors/b.key_secret\n"
    assert main(["keygen", str(folder)]) == 0
    assert "nothing is made" in capsys.readouterr().out


def test_an_actor_looks_for_its_keys_beside_the_endpoint(tmp_path: Path) -> None:
    connect = f"file:{tmp_path}/endpoint"
    words = ["actor", "--name", "a", "--connect"]
    assert _keys_beside(parse([*words, connect])) is None
    (tmp_path / "keys").mkdir()
    assert _keys_beside(parse([*words, connect])) == tmp_path / "keys"
    assert _keys_beside(parse([*words, connect, "--keys", "other"])) == Path("other")
    assert _keys_beside(parse([*words, "tcp://127.0.0.1:1"])) is None
