"""The learner's step on a packed batch, against a padded batch and against TRL's GRPO step.

    python benchmarks/learner.py [--model-size 150k|3m] [--only step policy loss profile] [--json FILE]

Four parts, each measured in one process, the sides taking turns; the median of the repeats counts.

    step     one Trainer.step (score, estimate, update of critic and policy): packed networks against the same
             Trainer with plain Hugging Face networks on a batch padded to the longest; MFU beside it
    policy   the update of the policy alone (forward, loss, metrics, backward, clipping, AdamW) under GRPO's
             advantages: packed, padded, and TRL with all completions at once and with 8 at a time, its default
    loss     memory of the log-probs and their backward as the vocabulary grows
    profile  the ten operators in which a packed step spends most time

Tokens are response tokens. Times are CPU seconds of this process on one thread: the wall clock of a core that
nobody else uses. The first repeat of each side is not timed: its gradient norm is compared with the others',
and its memory is recorded, which is the peak of what torch's allocator handed out above what was held before
(the weights; Adam's state is made in that repeat). That is exact, and leaves out what libraries allocate by
themselves.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or this file would hide the package `learner`

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.opponents import PaddedCritic, PaddedPolicy, plain_model, trl_update
from common.config import (
    AdvantageEstimator,
    AlgorithmConfig,
    Config,
    Correction,
    LearnerConfig,
    ModelConfig,
    OptimizerConfig,
    StalenessConfig,
)
from learner.algorithm.experience import estimate
from learner.algorithm.objective import count
from learner.algorithm.packing import Batch, boundaries
from learner.algorithm.trainer import Totals, Trainer
from learner.algorithm.work import Stopwatch, Work
from learner.networks.logprobs import token_logprobs
from learner.networks.model import Critic, Policy, load_critic, load_policy
from learner.prepare import RECIPES, build_model, build_tokenizer

CPU = torch.device("cpu")
GROUP_SIZE, LONGEST, MEAN_LENGTH, SPREAD = 8, 370, 60, 0.85  # of response lengths; spread of their logarithm
LEARNING_RATE = 1e-6
VOCABULARIES = (1_000, 4_000, 16_000, 64_000, 152_000)
PARTS = ("step", "policy", "loss", "profile")
GIGA, MIB = 1e9, 2**20


@dataclass(frozen=True, kw_only=True)
class Row:
    """One side of one part."""

    side: str
    seconds: float  # median of the repeats
    tokens_per_s: float
    relative: float  # tokens per second, packed = 1
    peak_mib: float


def save_model(size: str, folder: Path) -> None:
    """The demo's architecture with random weights (150k), or four layers of four times the width (3m)."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(RECIPES["number_walk"].characters)
    model = build_model(tokenizer)
    if size == "3m":
        wide = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "layer_types": None}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model = Qwen2ForCausalLM(Qwen2Config(**model.config.to_dict() | wide | heads))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_batch(num_sequences: int, vocabulary: int, mean: int = MEAN_LENGTH, longest: int = LONGEST) -> Batch:
    """Random tokens; response lengths log-normal, clipped, one of them the longest; prompts of 4..8 tokens."""
    generator = torch.Generator().manual_seed(0)
    spread_B = torch.randn(num_sequences, generator=generator).mul(SPREAD).exp()
    response_lengths_B = (spread_B * mean / spread_B.mean()).long().clamp(1, longest)
    response_lengths_B[0] = longest
    prompt_lengths_B = 4 + torch.arange(num_sequences) // GROUP_SIZE % 5
    num_tokens = int((prompt_lengths_B + response_lengths_B).sum())
    tokens_S = torch.randint(2, vocabulary, (num_tokens,), generator=generator)
    return batch_of(tokens_S, prompt_lengths_B, response_lengths_B, generator)


def batch_of(
    token_ids_S: torch.Tensor,
    prompt_lengths_B: torch.Tensor,
    response_lengths_B: torch.Tensor,
    generator: torch.Generator,
) -> Batch:
    """These sequences in groups of GROUP_SIZE, on-policy, 40% of them right, by chance."""
    num_sequences, num_tokens = len(prompt_lengths_B), int(response_lengths_B.sum())
    is_correct_B = torch.rand(num_sequences, generator=generator) < 0.4
    return Batch(
        token_ids_S=token_ids_S,
        cu_seqlens_B1=boundaries(prompt_lengths_B + response_lengths_B),
        prompt_lengths_B=prompt_lengths_B,
        response_lengths_B=response_lengths_B,
        behavior_logprobs_T=torch.full((num_tokens,), -3.0),
        versions_T=torch.zeros(num_tokens, dtype=torch.int64),
        rewards_B=torch.where(is_correct_B, 1.0, -1.0),
        is_correct_B=is_correct_B,
        is_truncated_B=torch.zeros(num_sequences, dtype=torch.bool),
        group_index_B=torch.arange(num_sequences) // GROUP_SIZE,
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def make_config(folder: Path, algorithm: AlgorithmConfig) -> Config:
    """One optimizer step per step, on-policy; everything else is the default."""
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE, warmup_steps=0)
    return Config(
        model=ModelConfig(path=str(folder)),
        staleness=StalenessConfig(max_staleness=0),
        algorithm=algorithm,
        learner=LearnerConfig(mini_batches=1, policy=optimizer, critic=optimizer),
    )


def make_networks(config: Config, is_packed: bool) -> tuple[nn.Module, nn.Module]:
    """(policy, critic), the same weights on both sides. The critic's head is not zero: it has been trained."""
    folder = Path(config.model.path)
    policy: Policy = load_policy(config, CPU, None)
    critic: Critic = load_critic(config, CPU, None)
    nn.init.normal_(critic.head.weight, std=0.02, generator=torch.Generator().manual_seed(1))
    if is_packed:
        return policy, critic
    return PaddedPolicy(plain_model(folder)), PaddedCritic(plain_model(folder).base_model, critic.head)


def step_sides(folder: Path, batch: Batch) -> dict[str, Callable[[], float]]:
    """A full step of each side; a call returns the policy's gradient norm."""
    config = make_config(folder, AlgorithmConfig(correction=Correction.none))

    def side(is_packed: bool) -> Callable[[], float]:
        trainer = Trainer(config, *make_networks(config, is_packed), rank=0, world=1)
        return lambda: trainer.step(batch, version=0, is_warmup=False)["policy/grad_norm"]

    return {"packed": side(True), "padded": side(False)}


def policy_sides(folder: Path, batch: Batch) -> tuple[dict[str, Callable[[], float]], str | None]:
    """An update of the policy on each side, and why TRL is not among them (None: it is)."""
    sides = {"packed": our_update(folder, batch, True), "padded": our_update(folder, batch, False)}
    try:
        for rows in (batch.num_sequences, 8):
            sides[f"trl, {rows} rows at once"] = trl_update(folder, batch, rows, LEARNING_RATE)
    except ImportError as error:
        return sides, f"not installed ({str(error).splitlines()[-1]})"
    return sides, None


def our_update(folder: Path, batch: Batch, is_packed: bool) -> Callable[[], float]:
    """Trainer's own update of the policy, on an experience that was estimated once."""
    config = make_config(
        folder, AlgorithmConfig(advantage=AdvantageEstimator.grpo, positive_lm_weight=0.0, correction=Correction.none)
    )
    policy, _ = make_networks(config, is_packed)
    trainer = Trainer(config, policy, None, rank=0, world=1)
    (plan,) = trainer._plans(batch, is_warmup=False)
    mine, scores = trainer._score(batch, plan, is_warmup=False)
    experience = estimate(config, batch, mine, scores, 0, False, None)
    counts = count(batch, experience, plan[0])

    def update() -> float:
        work = Work(batch, experience, 0, False, True, trainer.policy.num_updates, Totals(CPU), Stopwatch(CPU))
        trainer._update_policy(work, plan[0], counts)
        return work.totals.reduce(None)[0]["policy/grad_norm"]

    return update


def compare(sides: dict[str, Callable[[], float]], batch: Batch, repeats: int) -> list[Row]:
    """Medians of interleaved repeats. Raises AssertionError when the sides' first gradients differ."""
    first = {name: recorded_peak(run) for name, run in sides.items()}
    for name, (norm, _) in first.items():
        ours = first["packed"][0]
        assert abs(norm / ours - 1) < 1e-2, f"{name} has gradient norm {norm}, packed {ours}"
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, run in sides.items():
            times[name].append(_seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [
        Row(
            side=name,
            seconds=medians[name],
            tokens_per_s=batch.num_response_tokens / medians[name],
            relative=medians["packed"] / medians[name],
            peak_mib=first[name][1] / MIB,
        )
        for name in sides
    ]


def recorded_peak(run: Callable[[], float]) -> tuple[float, int]:
    """(what `run` returns, largest sum of torch's CPU allocations minus releases while it runs, in bytes)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


def useful_flops(folder: Path, batch: Batch, num_critics: int = 1) -> float:
    """Multiply-adds x 2 of one full step without padding or recomputation: policy and critic, each scored
    (forward) and updated (forward and twice that backward)."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in name)
    pairs = float((batch.lengths_B * (batch.lengths_B + 1)).sum()) / 2
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    backbone = 2 * linear * batch.num_tokens + 4 * width * pairs * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size * batch.num_response_tokens
    return 4 * ((1 + num_critics) * backbone + head)


def matmul_ceiling(size: int) -> float:
    """float32 multiply-adds x 2 per CPU second of the best of nine products of square matrices."""
    a, b = torch.randn(2, size, size).unbind()
    return max(2 * size**3 / _seconds(lambda: a @ b) for _ in range(9))


def _seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def loss_memory(num_tokens: int, width: int) -> list[dict[str, object]]:
    """Peak MiB of the log-probs, entropies and their backward, by vocabulary.

    The hidden states and the head's weight (V x D) are there before and not counted. `peak` is everything
    that is allocated; `beyond_gradients` leaves out the gradients of the two, which any implementation
    returns. `one_copy_of_logits` is computed, T x V float32; a plain log-softmax holds at least two.
    """
    return [_loss_memory(num_tokens, width, vocabulary) for vocabulary in VOCABULARIES]


def _loss_memory(num_tokens: int, width: int, vocabulary: int) -> dict[str, object]:
    hidden_TD = torch.randn(num_tokens, width, requires_grad=True)
    weight_VD = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    targets_T = torch.randint(vocabulary, (num_tokens,))
    chunk_tokens = LearnerConfig().logprob_chunk_tokens

    def run() -> float:
        logprobs_T, _ = token_logprobs(hidden_TD, weight_VD, targets_T, temperature=1.0, chunk_tokens=chunk_tokens)
        logprobs_T.sum().backward()
        return 0.0

    _, peak = recorded_peak(run)
    return {
        "vocabulary": vocabulary,
        "peak_mib": peak / MIB,
        "beyond_gradients_mib": (peak - 4 * width * (vocabulary + num_tokens)) / MIB,
        "one_copy_of_logits_mib": 4 * num_tokens * vocabulary / MIB,
    }


def hottest(run: Callable[[], object], count: int = 10) -> list[dict[str, object]]:
    """The operators with the most time of their own, and their share of all."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    averages = sorted(recorded.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in averages)
    return [
        {
            "operator": row.key,
            "calls": row.count,
            "ms": row.self_cpu_time_total / 1e3,
            "share": row.self_cpu_time_total / total,
        }
        for row in averages[:count]
    ]


def show(title: str, rows: list[dict[str, object]]) -> None:
    """A table."""
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in cells[0]}
    print(f"\n{title}")
    for row in [{name: name for name in widths}, *cells]:
        print("  " + "  ".join(row[name].rjust(width) for name, width in widths.items()), flush=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All parts that were asked for, printed as they come; what goes into the JSON file."""
    save_model(arguments.model_size, folder)
    model = plain_model(folder)
    batch = make_batch(arguments.sequences, model.config.vocab_size)
    padding = batch.num_sequences * int(batch.lengths_B.max()) / batch.num_tokens
    facts: dict[str, object] = {
        "parameters": model.num_parameters(),
        "sequences": batch.num_sequences,
        "response_tokens": batch.num_response_tokens,
        "mean_response": batch.num_response_tokens / batch.num_sequences,
        "longest_response": int(batch.response_lengths_B.max()),
        "padded_over_packed_tokens": padding,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "repeats": arguments.repeats,
    }
    print(", ".join(f"{name} {_cell(value)}" for name, value in facts.items()))
    if "step" in arguments.only:
        facts |= measure_step(folder, batch, arguments.repeats)
    if "policy" in arguments.only:
        sides, missing = policy_sides(folder, batch)
        rows = [asdict(row) for row in compare(sides, batch, arguments.repeats)]
        show("policy update", rows)
        if missing:
            print(f"  trl: {missing}")
        facts["policy"] = {"rows": rows, "trl": missing or "measured"}
    if "loss" in arguments.only:
        loss_rows = loss_memory(num_tokens=2048, width=64)
        show("memory of the loss, 2048 tokens, width 64", loss_rows)
        facts["loss"] = loss_rows
    if "profile" in arguments.only:
        run = step_sides(folder, batch)["packed"]
        run()
        profile_rows = hottest(run)
        show("where a packed step spends its time", profile_rows)
        facts["profile"] = profile_rows
    return facts


def measure_step(folder: Path, batch: Batch, repeats: int) -> dict[str, object]:
    """The full step and its share of the ceiling."""
    ceilings = {size: matmul_ceiling(size) for size in (64, 256, 1024)}
    rows = compare(step_sides(folder, batch), batch, repeats)
    ceiling = max(ceilings.values())
    mfu = {row.side: useful_flops(folder, batch) / row.seconds / ceiling for row in rows}
    show("full step", [asdict(row) | {"mfu": mfu[row.side]} for row in rows])
    print("  matmul, GFLOP/s: " + ", ".join(f"{size}^3 {flops / GIGA:.0f}" for size, flops in ceilings.items()))
    gflops = {size: flops / GIGA for size, flops in ceilings.items()}
    return {"step": [asdict(row) for row in rows], "mfu": mfu, "matmul_gflops": gflops}


def main() -> None:
    parser = argparse.ArgumentParser(description="The learner's step: packed against padded and TRL")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--model-size", choices=("150k", "3m"), default="150k")
    parser.add_argument("--sequences", type=int, default=128, help="multiple of 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to measure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
