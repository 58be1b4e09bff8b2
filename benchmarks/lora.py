"""Memory and time of a training step: all weights or adapters, a critic of its own or on the policy's backbone.

    python benchmarks/lora.py [--width 512] [--layers 6] [--sequences 32] [--repeats 3] [--rank 8] [--json FILE]

Each side is a process of its own, on one thread, and the sides take turns. A side loads a random Qwen2 model, takes one
step that is not timed, and one that is: scores, advantages, one update of the critic and one of the policy.

    weights, gradients, optimizer   bytes of the tensors that the side holds; gradients while they are there
    peak                            of resident memory during the timed step, above what imports take: those and
                                    activations
    seconds                         CPU seconds of the timed step, the median
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or this file would hide the package `learner`

import psutil
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as hf_logging

from benchmarks.learner import make_batch, make_config, show
from common.config import AdvantageEstimator, AlgorithmConfig, Correction, CriticNetwork, LoraConfig
from learner.algorithm.trainer import Trainer
from learner.networks.model import load_networks
from learner.prepare import RECIPES, build_tokenizer

CPU = torch.device("cpu")
MIB = 2**20
VOCABULARY = 4096
VAPO = AlgorithmConfig(correction=Correction.none)
GRPO = replace(VAPO, advantage=AdvantageEstimator.grpo, length_adaptive_alpha=None)
# name: (algorithm, has adapters, what the critic is)
SIDES = {
    "GRPO, all weights": (GRPO, False, CriticNetwork.separate),
    "GRPO, LoRA": (GRPO, True, CriticNetwork.separate),
    "VAPO, all weights": (VAPO, False, CriticNetwork.separate),
    "VAPO, LoRA, two backbones": (VAPO, True, CriticNetwork.separate),
    "VAPO, LoRA, shared backbone": (VAPO, True, CriticNetwork.shared_backbone),
}


def save_model(width: int, layers: int, folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(RECIPES["number_walk"].characters)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(side: str, folder: Path, num_sequences: int, rank: int) -> dict[str, float]:
    """One side, in this process."""
    algorithm, has_adapters, critic = SIDES[side]
    config = make_config(folder, algorithm)
    lora = LoraConfig(rank=rank) if has_adapters else LoraConfig()
    config = replace(config, lora=lora, model=replace(config.model, critic=critic))
    process, batch = psutil.Process(), make_batch(num_sequences, VOCABULARY)
    before = process.memory_info().rss
    networks = load_networks(config, CPU, None)
    trainer = Trainer(config, networks.policy, networks.critic, rank=0, world=1)
    trainer.step(batch, version=0, is_warmup=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory counts from here
    started = time.process_time()
    trainer.step(batch, version=0, is_warmup=False)
    seconds = time.process_time() - started
    optimised = [trained for trained in (trainer.policy, trainer.critic) if trained is not None]
    roots = [network.root for network in (networks.policy, networks.critic) if network is not None]
    return {
        "weights_mib": _mib(p for root in roots for p in root.parameters()),
        # of one network at a time: the critic's are gone when the policy's come
        "gradients_mib": max(_mib(trained.network.parameters()) for trained in optimised),
        "optimizer_mib": _mib(
            value
            for trained in optimised
            for state in trained.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ),
        "peak_mib": (_peak_rss() - before) / MIB,
        "seconds": seconds,
    }


def _mib(tensors: Iterable[Tensor]) -> float:
    """Of tensors that may be shared."""
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
    return sum(sizes.values()) / MIB


def _peak_rss() -> int:
    """Bytes, since the peak was last cleared."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def run_side(side: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    command += ["--sequences", str(arguments.sequences), "--rank", str(arguments.rank)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800.0)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of a step: LoRA against all weights")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--width", type=int, default=512, help="multiple of 128")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=32, help="multiple of 8")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.disable_progress_bar()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.folder, arguments.sequences, arguments.rank)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_model(arguments.width, arguments.layers, Path(folder))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for _ in range(arguments.repeats):
            for side, repeats in found.items():
                repeats.append(run_side(side, Path(folder), arguments))
    rows: list[dict[str, object]] = [
        {"side": side} | {key: statistics.median(repeat[key] for repeat in repeats) for key in repeats[0]}
        for side, repeats in found.items()
    ]
    show(f"a step, width {arguments.width}, {arguments.layers} layers, {arguments.sequences} sequences", rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
