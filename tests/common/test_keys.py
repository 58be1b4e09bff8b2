"""Key folders: what is made, who may read it, who is allowed, and sentences for what is missing."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from common.config import Config, ConfigError, TransportConfig
from common.keys import LearnerKeys, actor_keys, check_keys, learner_keys, make_keys, refuse_open


def run_in(tmp_path: Path, **transport: object) -> Config:
    return Config(runs_dir=str(tmp_path), name="run", transport=TransportConfig(**transport))  # type: ignore[arg-type]


def test_secrets_are_for_their_owner_alone_and_nothing_is_replaced(tmp_path: Path) -> None:
    old_mask = os.umask(0)  # as permissive as can be
    try:
        made = make_keys(tmp_path / "keys", ["a"])
    finally:
        os.umask(old_mask)
    assert [path.name for path in made] == ["learner.key_secret", "a.key_secret"]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o600}
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700
    before = [path.read_bytes() for path in made]
    assert [path.name for path in make_keys(tmp_path / "keys", ["a", "b"])] == ["b.key_secret"]
    assert [path.read_bytes() for path in made] == before
    assert sorted(path.name for path in (tmp_path / "keys" / "actors").iterdir()) == [
        "a.key", "a.key_secret", "b.key", "b.key_secret",
    ]  # fmt: skip


def test_a_run_without_keys_makes_its_own_and_its_actors_find_them(tmp_path: Path) -> None:
    config = run_in(tmp_path)
    learner = learner_keys(config)
    again = learner_keys(config)
    actor = actor_keys(config, "actor-0")
    assert learner is not None and again is not None and actor is not None
    assert learner.own == again.own, "a restarted learner is the same to its actors"
    assert actor.learner == learner.own.public
    assert learner.callback("", actor.own.public)
    assert not learner.callback("", learner.own.public)
    assert actor.own.secret.decode() not in repr(actor)


def test_an_actor_uses_the_pair_of_its_name_before_the_shared_one(tmp_path: Path) -> None:
    make_keys(tmp_path, ["actor", "a"])
    config = run_in(tmp_path, keys=str(tmp_path))
    own, shared, other = (actor_keys(config, name) for name in ("a", "b", "c"))
    assert own is not None and shared is not None
    assert own.own != shared.own
    assert shared == other


def test_keys_that_come_and_go_count_at_once_and_a_half_copied_one_allows_nobody(tmp_path: Path) -> None:
    make_keys(tmp_path, ["a"])
    config = run_in(tmp_path, keys=str(tmp_path))
    learner = LearnerKeys(tmp_path)
    make_keys(tmp_path, ["b"])
    a, b = actor_keys(config, "a"), actor_keys(config, "b")
    assert a is not None and b is not None
    assert learner.callback("", a.own.public) and learner.callback("", b.own.public)
    (tmp_path / "actors" / "half.key").write_text('    public-key = "abc"\n')
    (tmp_path / "actors" / "a.key").unlink()
    assert not learner.callback("", a.own.public)
    assert learner.callback("", b.own.public)
    for file in (tmp_path / "actors").iterdir():
        file.unlink()
    (tmp_path / "actors").rmdir()
    assert not learner.callback("", b.own.public), "a list that cannot be read allows nobody"


def test_what_is_missing_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor a has no keys, .*run/keys is not there: give --keys"):
        actor_keys(run_in(tmp_path), "a")
    with pytest.raises(ConfigError, match=r"learner\.key_secret cannot be read .*run\.py keygen"):
        check_keys(run_in(tmp_path, keys=str(tmp_path)))
    make_keys(tmp_path, [])
    with pytest.raises(ConfigError, match=r"no actor could connect: .*actors holds no \*\.key"):
        check_keys(run_in(tmp_path, keys=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"--actor '\.\./x' must be"):
        make_keys(tmp_path, ["../x"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"keys cannot be made in .*file/keys"):
        make_keys(tmp_path / "file" / "keys")


def test_curve_off_needs_no_keys(tmp_path: Path) -> None:
    config = run_in(tmp_path, curve=False)
    check_keys(config)
    assert learner_keys(config) is None
    assert actor_keys(config, "a") is None
    assert not (tmp_path / "run").exists()


def test_a_library_without_curve_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: False)
    for use in (check_keys, learner_keys, lambda config: actor_keys(config, "a")):
        with pytest.raises(ConfigError, match=r"has no CURVE.*transport\.curve=off"):
            use(run_in(tmp_path))
    check_keys(run_in(tmp_path, curve=False))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_an_open_address_without_keys_is_refused_unless_it_is_asked_for(host: str, tmp_path: Path) -> None:
    transport = TransportConfig(host=host)
    with pytest.raises(ConfigError, match=rf"transport\.host={host} can be reached .*keygen.*curve=off"):
        refuse_open(transport, None)
    refuse_open(replace(transport, curve=False), None)
    refuse_open(transport, learner_keys(run_in(tmp_path)))
    for loopback in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        refuse_open(TransportConfig(host=loopback), None)
