"""Small tokenizers as Hugging Face folders, with the habits of large ones."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "0123456789+-=?#|:abcdefghijklmnopqrstuvwxyz"
BOS, EOS = 1, 2
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}|assistant:{% endif %}"
    "{% if think %}think{% endif %}"
)


def write_tokenizer(folder: Path, *, prefix: str = "", suffix: str = "", template: str | None = None) -> str:
    """One token per character; unknown ones vanish. `prefix` and `suffix` are special tokens put around every text."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(f"[^{CHARACTERS}]".replace("-", "\\-"), "removed"), pre_tokenizers.Split("", "isolated")]
    )
    tokenizer.decoder = decoders.Fuse()
    if prefix or suffix:
        around = " ".join(part for part in (prefix, "$A", suffix) if part)
        ids = [(token, vocabulary[token]) for token in SPECIAL]
        tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    return str(folder)


def ids_of(text: str) -> list[int]:
    return [len(SPECIAL) + CHARACTERS.index(character) for character in text]
