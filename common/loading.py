"""Reading a run's configuration: files and `key=value` merged into the records of common/config.py.

Merging goes left to right and is strict: an unknown key, a wrong type or an impossible combination is a
ConfigError whose message is one sentence. The resolved configuration is written to RUN/config.yaml, which
is what child processes read.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from common.config import Config, ConfigError
from common.hub import fetch_model, is_hub_name
from common.validation import validate

# Settings that a user of other trainers looks for, and why they are not here.
_REFUSED = dict.fromkeys(
    ("rollout.top_p", "rollout.top_k", "rollout.min_p"),
    ": responses that are trained must be drawn from the whole distribution, because with tokens cut off the engine's "
    "log-probs are of another policy than the learner's and the importance weights are wrong; eval.top_p and "
    "eval.top_k cut off tokens in evaluations",
) | {
    "lora.dropout": ": the engine samples without dropout, and with it in the learner the ratios of the first update "
    "would not be 1 but noise around it, inside the clip range and out of it, so adapters are trained without dropout"
}

RECIPES = Path(__file__).resolve().parent.parent / "configs"  # shipped recipes and base models


def load_config(files: Sequence[str], overrides: Sequence[str]) -> Config:
    """The validated configuration: defaults, then `files` left to right, then `key=value` overrides.

    Args:
        files: paths of YAML files, or names of shipped recipes ("demo" is configs/demo.yaml).
        overrides: "section.key=value", values in YAML syntax ("null" clears an optional setting).

    Raises:
        ConfigError: unreadable file, unknown key, wrong type or impossible combination.
    """
    merged = OmegaConf.structured(Config)
    for file in files:
        path = find_recipe(file)
        merged = _merge(merged, _read_yaml(path), str(path))
    for override in overrides:
        merged = _merge(merged, _parse_override(override), "the command line")
    config = _locate_models(_to_config(merged))
    validate(config)
    return config


def read_config(path: str | Path) -> Config:
    """The configuration in `path` as it stands, types checked but not whether this machine can run it.

    Raises:
        ConfigError: as `load_config`, but for impossible combinations and missing model folders.
    """
    return _to_config(_merge(OmegaConf.structured(Config), _read_yaml(Path(path)), str(path)))


def config_of_run(run: Path) -> Path:
    """RUN/config.yaml. Raises ConfigError when `run` is no run directory."""
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run directory: it has no config.yaml")
    return path


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration; `path` has either its old content or all of the new one."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    temporary.replace(target)


def find_recipe(name: str) -> Path:
    """The file that `-c NAME` means: a path, or a recipe shipped with the package. Raises ConfigError."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))
    raise ConfigError(
        f"no configuration file {name}: give the path of a YAML file or one of the recipes {', '.join(names)}"
    )


def _locate_models(config: Config) -> Config:
    """Folders in the place of names: shipped ones are found from anywhere, those of the Hub are fetched."""
    model = config.model
    path = _located(model.path, "model.path")
    critic_path = _located(model.critic_path, "model.critic_path") if model.critic_path is not None else None
    return replace(config, model=replace(model, path=path, critic_path=critic_path))


def _located(path: str, setting: str) -> str:
    shipped = RECIPES.parent / path
    if not Path(path).exists() and shipped.exists():
        return str(shipped)
    return fetch_model(path, setting) if is_hub_name(path) else path


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} is not readable YAML: {_one_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping of settings, not a list or a single value")
    return loaded


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key or key != key.strip() or not all(key.split(".")):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r} is not readable: {_one_line(error)}") from error


def _merge(base: DictConfig, update: DictConfig, source: str) -> DictConfig:
    try:
        return cast(DictConfig, OmegaConf.merge(base, update))
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise ConfigError(f"unknown setting {key} in {source}{_suggest(key)}") from error
    except OmegaConfBaseException as error:
        where = _describe_value(error, update)
        raise ConfigError(f"{where} in {source} does not fit: {_one_line(error)}") from error


def _to_config(merged: DictConfig) -> Config:
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{missing[0]} is not set: add {missing[0]}=VALUE or a recipe that sets it")
    try:
        return cast(Config, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(f"{error.full_key or 'a setting'} does not resolve: {_one_line(error)}") from error


def _describe_value(error: OmegaConfBaseException, update: DictConfig) -> str:
    """ "key=value" of the setting that did not fit, as far as OmegaConf says which one it was."""
    key = error.full_key
    if not key:  # a plain value where a section belongs
        key = next((str(name) for name in update if not isinstance(update[name], DictConfig)), None)
    return f"{key}={OmegaConf.select(update, key)}" if key else "a section"


def _suggest(key: str) -> str:
    """A did-you-mean for an unknown key: the same name in another section, else the closest full key."""
    if key in _REFUSED:
        return _REFUSED[key]
    known = list(_full_keys(OmegaConf.structured(Config)))
    leaf = key.rpartition(".")[2]
    close = [name for name in known if name.rpartition(".")[2] == leaf]
    close = close or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    close = close or [name for name in known if difflib.SequenceMatcher(None, name, leaf).ratio() > 0.7]
    return f": did you mean {close[0]}?" if close else "; common/config.py lists all settings"


def _full_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in node:
        name = f"{prefix}{key!s}"
        yield name
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            yield from _full_keys(child, f"{name}.")


def _one_line(error: Exception) -> str:
    """The first line of OmegaConf's message, or all of YAML's on one line (it says where)."""
    text: str = str(error)
    return " ".join(text.split()) if isinstance(error, YAMLError) else text.partition("\n")[0]
