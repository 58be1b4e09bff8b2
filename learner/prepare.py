"""Builds a small base model of a procedural task: `run.py prepare MODEL`.

A character tokenizer, a Qwen2 model of about 150k parameters, and supervised training on imperfect
demonstrations in phases: the first ones teach the format and the skill, the last, short one teaches bad
habits for reinforcement learning to remove. A recipe may start from another shipped model. The result is a
Hugging Face folder in float32 that transformers and vLLM load without a network.

The same seed gives the same bytes: data, initial weights and sampling come from seeded generators, on one
thread.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, repeat
from pathlib import Path
from random import Random

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from common.config import ConfigError, TaskConfig
from common.loading import RECIPES as SHIPPED
from common.tasks import chain_sum, load_task, number_walk
from common.types import JSON, Prompt, Verdict

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"
MODELS = SHIPPED / "models"
SAMPLES_PER_PROMPT = 4  # k of the reported avg@k
MAX_POSITIONS = 256  # prompt + response tokens; both tasks stay below 180
POOL_BATCHES = 32  # batches drawn at once and sorted by length, so that a batch has next to no padding

Demonstration = tuple[str, str]  # prompt, response


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of supervised training: linear warm-up, then a cosine down to `final_lr_fraction`."""

    label: str
    num_steps: int
    batch_size: int  # demonstrations
    learning_rate: float
    demonstrate: Callable[[Random], Demonstration]
    warmup_steps: int = 100
    final_lr_fraction: float = 0.05

    def lr_scale(self, step: int) -> float:
        """Factor of `learning_rate` at step 0..num_steps-1."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return warmup * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is particular to one base model."""

    task: str
    start_from: str | None = None  # shipped model to go on from; None: fresh weights
    characters: str
    max_response_tokens: int
    phases: tuple[Phase, ...]
    verify: Callable[[str, str, dict[str, JSON]], Verdict]


# With carry_drop=0, hard_term only decides which random numbers are drawn.
def _sums(carry_drop: float, hard_term: int) -> Callable[[Random], Demonstration]:
    return lambda rng: chain_sum.sample_demonstration(rng, carry_drop, hard_term)


def _walks(right_direction: float, careless_landing: float, near_share: float) -> Callable[[Random], Demonstration]:
    return lambda rng: number_walk.sample_demonstration(rng, right_direction, careless_landing, near_share)


def _wanderings(rng: Random) -> Demonstration:
    """Walks that first wander and then go home, 40 moves at most: longer than the task allows."""
    return number_walk.sample_demonstration(rng, 0.97, 0.0, 0.3, wandering_moves=28, max_moves=40)


# Measured after the first phases: chain_sum 0.998, number_walk 0.82. Short walks teach landing and long walks
# arithmetic; long walks alone did not teach landing in the same time.
RECIPES = {
    chain_sum.NAME: Recipe(
        task=chain_sum.NAME,
        characters=chain_sum.CHARACTERS,
        max_response_tokens=chain_sum.MAX_RESPONSE_TOKENS,
        verify=chain_sum.verify,
        phases=(
            Phase(
                label="clean sums",
                num_steps=5000,
                batch_size=16,
                learning_rate=3e-3,
                demonstrate=_sums(carry_drop=0.0, hard_term=8),
            ),
            Phase(
                label="dropped carries",
                num_steps=250,
                batch_size=24,
                learning_rate=5e-4,
                demonstrate=_sums(carry_drop=0.65, hard_term=7),
                warmup_steps=10,
            ),
        ),
    ),
    number_walk.NAME: Recipe(
        task=number_walk.NAME,
        characters=number_walk.CHARACTERS,
        max_response_tokens=number_walk.MAX_RESPONSE_TOKENS,
        verify=number_walk.verify,
        phases=(
            Phase(
                label="short walks",
                num_steps=5000,
                batch_size=32,
                learning_rate=3e-3,
                demonstrate=_walks(right_direction=0.97, careless_landing=0.0, near_share=0.8),
            ),
            Phase(
                label="long walks",
                num_steps=3000,
                batch_size=24,
                learning_rate=2e-3,
                demonstrate=_walks(right_direction=0.97, careless_landing=0.0, near_share=0.2),
            ),
            Phase(
                label="careless walks",
                num_steps=400,
                batch_size=24,
                learning_rate=5e-4,
                demonstrate=_walks(right_direction=0.75, careless_landing=0.6, near_share=0.0),
                warmup_steps=10,
            ),
        ),
    ),
    # First a walker that finds its way from wherever it is (measured: 0.83), then one that prefers the wrong way.
    "contrary_walk": Recipe(
        task=number_walk.NAME,
        start_from=number_walk.NAME,
        characters=number_walk.CHARACTERS,
        max_response_tokens=number_walk.MAX_RESPONSE_TOKENS,
        verify=number_walk.verify,
        phases=(
            Phase(
                label="wandering walks",
                num_steps=1500,
                batch_size=24,
                learning_rate=1.5e-3,
                demonstrate=_wanderings,
            ),
            Phase(
                label="contrary walks",
                num_steps=160,
                batch_size=24,
                learning_rate=6e-4,
                demonstrate=_walks(right_direction=0.43, careless_landing=0.6, near_share=0.0),
                warmup_steps=10,
            ),
        ),
    ),
}


def build_tokenizer(characters: str) -> Qwen2Tokenizer:
    """A tokenizer with one token per (ASCII) character, after the pad and the end-of-sequence token.

    It is byte-level BPE without merges, because transformers reads the tokenizer of every folder with a
    Qwen2 model as a Qwen2Tokenizer, whatever class the folder names. Like that class it leaves out
    characters that it does not know.
    """
    vocabulary = {token: i for i, token in enumerate([PAD_TOKEN, EOS_TOKEN, *characters])}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], unk_token=PAD_TOKEN, eos_token=EOS_TOKEN, pad_token=PAD_TOKEN)


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A Qwen2 model with fresh weights from torch's global generator.

    Two heads of 32 dimensions, because vLLM's CPU attention has no smaller head. The initial scale decides
    how long training takes: after 2000 steps of number_walk the loss is 0.53 nats a token (the demonstrations
    themselves have 0.50) with embeddings of standard deviation 1.0 and matrices of 0.08, 0.71 with 0.5 and
    0.125, and 1.0 with 0.5 and the usual 0.02.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.08,
        tie_word_embeddings=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen2ForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=1.0)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    # Nothing about sampling: an engine that reads this file must not find a top-k or a temperature in it.
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _load_shipped(name: str) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
    assert isinstance(model, Qwen2ForCausalLM)
    return model


def _batches(phase: Phase, excluded: frozenset[str], rng: Random) -> Iterator[list[Demonstration]]:
    """Endless batches of demonstrations of nearly equal length, none of them on an excluded prompt."""
    while True:
        drawn = (phase.demonstrate(rng) for _ in repeat(None))
        kept = (demonstration for demonstration in drawn if demonstration[0] not in excluded)
        pool = list(islice(kept, POOL_BATCHES * phase.batch_size))
        pool.sort(key=lambda demonstration: len(demonstration[0]) + len(demonstration[1]))
        batches = [pool[i : i + phase.batch_size] for i in range(0, len(pool), phase.batch_size)]
        rng.shuffle(batches)
        yield from batches


def _collate(batch: list[Demonstration], tokenizer: Qwen2Tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids, targets), both int64 [B, L]; targets are shifted by one and -100 outside the response."""
    sequences = [[*tokenizer.encode(p + r), tokenizer.eos_token_id] for p, r in batch]
    length = max(map(len, sequences))
    token_ids_BL = torch.full((len(batch), length), tokenizer.pad_token_id)
    targets_BL = torch.full((len(batch), length), -100)
    for i, (sequence, (prompt, _)) in enumerate(zip(sequences, batch, strict=True)):
        token_ids_BL[i, : len(sequence)] = torch.tensor(sequence)
        first = len(prompt) - 1  # the last prompt token predicts the first response token
        targets_BL[i, first : len(sequence) - 1] = token_ids_BL[i, first + 1 : len(sequence)]
    return token_ids_BL, targets_BL


def _train(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, phase: Phase, excluded: frozenset[str], rng: Random
) -> None:
    """Runs one phase of supervised training on the response tokens."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, phase.lr_scale)
    batches = islice(_batches(phase, excluded, rng), phase.num_steps)
    with tqdm(batches, total=phase.num_steps, desc=phase.label, unit="step") as progress:
        for step, batch in enumerate(progress):
            token_ids_BL, targets_BL = _collate(batch, tokenizer)
            logits_BLV = model(input_ids=token_ids_BL, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.inference_mode()
def sample_responses(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    texts: list[str],
    max_tokens: int,
    temperature: float,
) -> list[str]:
    """One response per text, without EOS, at `temperature` (0 is greedy), from torch's global generator."""
    prompts = [tokenizer.encode(text) for text in texts]
    length = max(map(len, prompts))
    token_ids_BL = torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in prompts])
    generation = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    mask_BL = (token_ids_BL != tokenizer.pad_token_id).long()
    output_BL = model.generate(token_ids_BL, attention_mask=mask_BL, generation_config=generation)
    return tokenizer.batch_decode(output_BL[:, length:], skip_special_tokens=True)


def measure_accuracy(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, recipe: Recipe, prompts: list[Prompt]
) -> tuple[float, float]:
    """(accuracy, mean response length in tokens) of 4 samples a prompt at temperature 1."""
    requests = [prompt for prompt in prompts for _ in range(SAMPLES_PER_PROMPT)]
    model.eval()
    texts = [prompt.text for prompt in requests]
    responses = sample_responses(model, tokenizer, texts, recipe.max_response_tokens, temperature=1.0)
    graded = zip(requests, responses, strict=True)
    correct = sum(recipe.verify(r, prompt.reference, prompt.row) is Verdict.CORRECT for prompt, r in graded)
    return correct / len(requests), sum(map(len, responses)) / len(responses) + 1


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """One thread and a seeded global generator; both are put back as they were."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(num_threads)


def build_base_model(recipe: Recipe, heldout: list[Prompt], out_dir: Path, seed: int) -> float:
    """Trains a base model, writes its folder and returns its held-out accuracy."""
    with _deterministic(seed):
        tokenizer = build_tokenizer(recipe.characters)
        model = build_model(tokenizer) if recipe.start_from is None else _load_shipped(recipe.start_from)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
        model.train()
        excluded = frozenset(prompt.text for prompt in heldout)
        for i, phase in enumerate(recipe.phases):
            _train(model, tokenizer, phase, excluded, Random(f"prepare/{seed}/{i}"))
        accuracy, mean_length = measure_accuracy(model, tokenizer, recipe, heldout)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)
    print(
        f"{out_dir}: held-out accuracy {accuracy:.3f} (avg@{SAMPLES_PER_PROMPT} of {len(heldout)} prompts at "
        f"temperature 1), mean response {mean_length:.1f} tokens"
    )
    return accuracy


def prepare(model_name: str, out_dir: str | None, seed: int) -> None:
    """Builds the base model `model_name` in `out_dir` (None: configs/models/NAME); prints its accuracy.

    Raises ConfigError for a model without a recipe.
    """
    if model_name not in RECIPES:
        raise ConfigError(f"there is no base model '{model_name}'; prepare knows: {', '.join(RECIPES)}.")
    recipe = RECIPES[model_name]
    folder = Path(out_dir) if out_dir is not None else Path("configs") / "models" / model_name
    folder.mkdir(parents=True, exist_ok=True)  # before the minutes that the training takes
    heldout = list(load_task(TaskConfig(name=recipe.task)).heldout)
    build_base_model(recipe, heldout, folder, seed)
