"""Models by their name on the Hugging Face Hub: OWNER/NAME becomes a folder on this machine."""

import re
from pathlib import Path

from common.config import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Copies of the weights in formats that neither the learner nor the engine reads.
_NOT_NEEDED = ["original/*", "*.gguf", "*.onnx", "onnx/*", "*.h5", "*.msgpack", "*.ot"]
_WEIGHTS = ("*.safetensors", "*.bin")


def is_hub_name(path: str) -> bool:
    """Whether `path` is no folder here but may name a model on the Hub."""
    return _NAME.fullmatch(path) is not None and not Path(path).exists()


def fetch_model(name: str, setting: str) -> str:
    """The folder of the model in the local cache, downloaded first if it is not there and the Hub can be reached.

    Raises ConfigError, which says how to fetch it; `setting` is where the user wrote the name.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, ignore_patterns=_NOT_NEEDED, local_files_only=HF_HUB_OFFLINE))
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "the Hub cannot be reached"
        raise ConfigError(_missing(setting, name, why)) from error
    except (HFValidationError, HfHubHTTPError) as error:
        raise ConfigError(
            f"{setting}={name} is neither a folder here nor a model that the Hub gives away ({_line(error)}): correct "
            f"the name, or log in with `hf auth login` if it needs a login"
        ) from error
    except Exception as error:  # a proxy that refuses, a connection that breaks, a full disk: all have their own kind
        raise ConfigError(_missing(setting, name, f"fetching it failed ({_line(error)})")) from error
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHTS):
        raise ConfigError(_missing(setting, name, "its files in the local cache lack the weights"))
    return str(folder)


def _missing(setting: str, name: str, why: str) -> str:
    return (
        f"{setting}={name} is neither a folder here nor in the cache of the Hub, and {why}: run `hf download {name}` "
        f"where there is a network, or give the folder of a copy"
    )


def _line(error: Exception) -> str:
    """The first line of what the client says, without its final stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
