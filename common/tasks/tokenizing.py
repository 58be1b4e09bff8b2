"""From a prompt to its token ids: chat messages through the tokenizer's chat template, a text as it stands.

Prompts never begin with the beginning-of-sequence token twice (a text that has it and a tokenizer that adds it), and
never end with the end-of-sequence token (a tokenizer that adds it to everything): a model asked to go on from there
would be asked something that it has never seen.

Importing this file does not load transformers; calling it does, and transformers loads torch.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from common.config import Config, ConfigError, ModelConfig
from common.tasks.rows import BadRow, RowError
from common.types import Prompt

# Beside vocabulary files, what decides on the ids of a prompt: every small text file of a model folder might.
_TOKENIZER_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
_OTHERS = ("config.json", "generation_config.json")
# What the template is called with in any case, or what would change what it returns.
_OWN_KEYWORDS = ("conversation", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict")


def tokenizing(config: Config) -> Callable[[Prompt], list[int]]:
    """The function from a prompt to its token ids; it raises RowError for a prompt that has none.

    Raises ConfigError when the tokenizer cannot be loaded.
    """
    tokenizer = load_tokenizer(config.model)
    keywords, start = config.task.chat_template_kwargs, _start(tokenizer)

    def tokenize(prompt: Prompt) -> list[int]:
        try:
            if prompt.messages is None:
                ids = _encoded(tokenizer, prompt.text)
                ids = ids if ids[: len(start)] == start else start + ids
            else:
                ids = _encoded(tokenizer, _rendered(tokenizer, prompt, keywords))
        except Exception as error:  # a template and a tokenizer may raise anything; it concerns this prompt
            raise RowError(
                BadRow.UNRENDERABLE, f"the tokenizer or its chat template refuses it ({_line(error)})"
            ) from error
        ids = _trimmed(ids, tokenizer.bos_token_id, tokenizer.eos_token_id)
        if not ids or (prompt.messages is None and ids == start):
            raise RowError(BadRow.NO_TOKENS, "the tokenizer knows nothing of it, so that it has no tokens")
        return ids

    return tokenize


def load_tokenizer(model: ModelConfig) -> Any:
    """The tokenizer of the model folder. Raises ConfigError when there is none that loads."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)  # says early what is missing
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # of the folder's files, or of code that it brings along
        raise ConfigError(
            f"configuration or tokenizer in model.path={model.path} do not load ({_line(error)}); save both there"
            f"{'' if model.trust_remote_code else ', or set model.trust_remote_code=true if you trust its own code'}"
        ) from error


def check_template(config: Config, prompts: Iterable[Prompt], place: Callable[[Prompt], str]) -> None:
    """Raises ConfigError when conversations meet a tokenizer without a template, or keywords that it does not use."""
    keywords = config.task.chat_template_kwargs
    chat = next((prompt for prompt in prompts if prompt.messages is not None), None)
    if chat is None and not keywords:
        return
    if chat is None:
        raise ConfigError(f"task.chat_template_kwargs={keywords} has no effect: no prompt is a conversation")
    template = load_tokenizer(config.model).chat_template
    if template is None:
        raise ConfigError(
            f"{place(chat)}: the prompt is a conversation, but the tokenizer in model.path={config.model.path} has no "
            "chat_template; use an instruction-tuned model's tokenizer, or give prompts as text"
        )
    for name in keywords:
        is_used = not isinstance(template, str) or re.search(rf"\b{re.escape(name)}\b", template)
        if name in _OWN_KEYWORDS or not is_used:
            why = "is set by this program" if name in _OWN_KEYWORDS else "does not occur in the tokenizer's template"
            raise ConfigError(f"task.chat_template_kwargs.{name}={keywords[name]!r} has no effect: {name} {why}")


def fingerprint(model: ModelConfig) -> str:
    """Of all files in the model folder that may decide on token ids; config.json only names the model's kind."""
    settings = json.loads((Path(model.path) / "config.json").read_text())
    digest = hashlib.sha256(str(settings.get("model_type")).encode())
    for file in sorted(Path(model.path).iterdir()):
        if file.suffix in _TOKENIZER_SUFFIXES and file.name not in _OTHERS and not file.name.endswith(".index.json"):
            digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _rendered(tokenizer: Any, prompt: Prompt, keywords: dict[str, Any]) -> str:
    messages = list(prompt.messages or ())
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **keywords)
    return text


def _encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _start(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    probes = (tokenizer.decode([index]) for index in range(len(tokenizer)))
    for text in ("a", *probes):
        inner = _encoded(tokenizer, text)
        if inner and inner[0] not in tokenizer.all_special_ids:
            whole: list[int] = tokenizer(text)["input_ids"]
            places = range(len(whole) - len(inner) + 1)
            return next((whole[:i] for i in places if whole[i : i + len(inner)] == inner), [])
    return []


def _trimmed(ids: list[int], bos: int | None, eos: int | None) -> list[int]:
    while len(ids) > 1 and ids[0] == ids[1] == bos:
        ids = ids[1:]
    while ids and ids[-1] == eos:
        ids = ids[:-1]
    return ids


def _line(error: Exception) -> str:
    """The first line of what a library says, without its final stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(" .:")
