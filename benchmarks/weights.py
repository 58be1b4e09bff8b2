"""Measures a publication: its parts, the stall of generation, what a joiner costs the others, and the rate of transfer.

    python benchmarks/weights.py [--models 150k 3m 135m 500m] [--engine receiver|vllm] [--repeats N] [--json FILE]

Service, publisher, gloo groups, buckets and actors are the real ones, in processes of their own on this host; weights
are random, bfloat16. With `--engine receiver` an actor's engine is a stand-in: vLLM's part is left out, what the real
receiver takes is copied into the parameters of the learner's own network, and nothing is sampled. With `--engine vllm`
it is vLLM, sampling all the time; for the small models.

*Pause*, *transfer* and *load* are parts of a publication to one actor: the phase PAUSE, the broadcasts, and what START,
UPDATE and FINISH take beyond these, messages included. *Stall* is the time from PAUSE to RESUME, in which the actor
draws no token. Then another actor joins and is served: how long that takes, the stall of the first actor meanwhile, and
its stall in the next publication, for which the group of both is made.

*Bare* broadcasts as many bytes in the same pieces from one buffer into another over a gloo group with a third process,
and does nothing else; *beside* it goes on beside the gathering of the same buckets, as a publication's broadcasts do.
They take turns with publications; ratios are of medians.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # or a module here would hide a package

import numpy as np
import torch
from torch.distributed import TCPStore
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.receiving_actor import act, random_policy
from common.broadcast import Background, Buffers, GlooGroup, join_gloo
from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Config,
    DType,
    LearnerConfig,
    ModelConfig,
    RolloutConfig,
    StalenessConfig,
    TransportConfig,
    WeightsConfig,
)
from common.quiet import quieter
from common.transport import model_fingerprints
from common.types import MemberId, Prompt, WeightsPhase, WeightsReport
from learner.networks.model import Policy
from learner.publication.buckets import BUCKET_BYTES, PolicySource, gather, plan
from learner.publication.publisher import Publication, Publisher
from learner.rollouts.service import LearnerService

HOST = "127.0.0.1"
MIB = 2**20
TIMEOUT_S = 300.0
TOKENIZER = Path(__file__).resolve().parents[1] / "configs" / "models" / "chain_sum"
PROBE = torch.arange(3, 15)
FORK = multiprocessing.get_context("forkserver")  # of a server that has imported what all of them need
FORK.set_forkserver_preload(["learner.main", "actors.main"])
DELIVERY = (WeightsPhase.START, WeightsPhase.UPDATE, WeightsPhase.FINISH)


def _qwen2(hidden: int, layers: int, heads: int, inner: int, vocabulary: int, is_tied: bool) -> PreTrainedConfig:
    return Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2,
        intermediate_size=inner,
        max_position_embeddings=512,
        tie_word_embeddings=is_tied,
        bos_token_id=None,
        eos_token_id=1,
    )


SHAPES: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "tiny": lambda: _qwen2(32, 1, 2, 48, 17, is_tied=False),
    "150k": lambda: _qwen2(64, 3, 2, 176, 17, is_tied=False),
    "3m": lambda: _qwen2(256, 4, 4, 720, 17, is_tied=False),
    "135m": lambda: LlamaConfig(  # SmolLM2-135M
        vocab_size=49152,
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
    ),
    "500m": lambda: _qwen2(896, 24, 14, 4864, 151936, is_tied=True),  # Qwen2.5-0.5B
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model; medians of `publications`. Seconds, and bytes over 2**20."""

    model: str
    engine: str
    parameters: int
    mib: float
    buckets: int
    publications: int
    pause_s: float
    transfer_s: float
    load_s: float
    publication_s: float
    stall_s: float
    join_s: float
    join_stall_s: float  # of the actor that was there before
    next_stall_s: float
    mib_per_s: float
    bare_mib_per_s: float
    ratio: float
    beside_mib_per_s: float
    beside_ratio: float


# ---- the learner


class TimedService(LearnerService):
    """Notes when who was told which phase, and how long it took."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.told: list[tuple[WeightsPhase, frozenset[str], float, float]] = []  # names, beginning, seconds

    def command(
        self,
        phase: WeightsPhase,
        version: int,
        payloads: Mapping[MemberId, dict[str, Any]],
        timeout_s: float,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[MemberId, WeightsReport]:
        began_s = time.monotonic()
        reports = super().command(phase, version, payloads, timeout_s, meanwhile)
        names = frozenset(member.name for member in payloads)
        self.told.append((phase, names, began_s, time.monotonic() - began_s))
        return reports

    def seconds(self, *phases: WeightsPhase) -> float:
        """Of these phases, since `told` was emptied."""
        return sum(seconds for phase, _, _, seconds in self.told if phase in phases)

    def stall_s(self, name: str) -> float:
        """From PAUSE to RESUME of one actor, since `told` was emptied; 0 when it was told nothing."""
        mine = [(phase, began_s) for phase, names, began_s, _ in self.told if name in names]
        paused = [began_s for phase, began_s in mine if phase is WeightsPhase.PAUSE]
        resumed = [began_s for phase, began_s in mine if phase is WeightsPhase.RESUME]
        return max(resumed) - min(paused) if paused else 0.0


def make_config(folder: Path, model: str, engine: str) -> Config:
    """Of a run that would sample for ever: no batch is taken."""
    SHAPES[model]().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    config = Config(
        model=ModelConfig(path=str(folder), dtype=DType.bfloat16, max_model_len=512),
        rollout=RolloutConfig(prompts_per_step=256, group_size=4, max_tokens=400),
        algorithm=AlgorithmConfig(critic_warmup_steps=0),
        staleness=StalenessConfig(max_staleness=8),
        learner=LearnerConfig(steps=1000),
        actors=ActorsConfig(start_timeout_s=TIMEOUT_S, groups_in_flight=8),
        weights=WeightsConfig(timeout_s=TIMEOUT_S),
        transport=TransportConfig(host=HOST, heartbeat_timeout_s=TIMEOUT_S, curve=False),
    )
    if engine == "vllm":
        random_policy(config).model.save_pretrained(folder)
    return config


@contextmanager
def learner(config: Config) -> Iterator[TimedService]:
    prompts = [Prompt(uid=f"p{i}", text="", reference="1") for i in range(1000)]
    fingerprints = model_fingerprints(config.model.path)
    with TimedService(config, prompts, lambda prompt: [3, 4, 5, 6], fingerprints, PROBE.tolist()) as service:
        yield service


@contextmanager
def actor(engine: str, config: Config, service: LearnerService, name: str) -> Iterator[ForkServerProcess]:
    """Leaves when the service stops."""
    process = FORK.Process(target=act, args=(engine, config, service.endpoint, name))
    process.start()
    try:
        service.wait_for_members(len(service.members()) + 1, TIMEOUT_S)
        yield process
    except BaseException:
        process.kill()
        raise


# ---- the bare broadcast


@dataclass
class Bare:
    """A gloo group of two processes, and pieces of one buffer that go through it."""

    pieces: Sequence[int]  # bytes of each
    _pipe: Connection = field(init=False)
    _group: GlooGroup = field(init=False)

    def __enter__(self) -> "Bare":
        store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_take, args=(store.port, self.pieces, theirs))
        self._process.start()
        self._group = GlooGroup(store, 0, 2, HOST, TIMEOUT_S)
        self._buffer = torch.zeros(max(self.pieces), dtype=torch.uint8)
        return self

    def seconds(self) -> float:
        """Of one pass over the pieces, until the other side has the last."""
        self._pipe.send("go")
        self._pipe.recv()
        started = time.perf_counter()
        for size in self.pieces:
            self._group.broadcast(self._buffer[:size])
        self._pipe.recv()
        return time.perf_counter() - started

    def __exit__(self, *_: object) -> None:
        self._pipe.send(None)
        self._process.join(TIMEOUT_S)
        self._group.close()


def _take(port: int, pieces: Sequence[int], pipe: Connection) -> None:
    torch.set_num_threads(1)
    group = join_gloo(HOST, port, 1, 2, TIMEOUT_S)
    buffer = torch.zeros(max(pieces), dtype=torch.uint8)
    while pipe.recv() is not None:
        pipe.send("ready")
        for size in pieces:
            group.broadcast(buffer[:size])
        pipe.send("done")


# ---- one model


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Of one publication."""

    pause_s: float
    transfer_s: float
    load_s: float
    publication_s: float
    stall_s: float


def measure(model: str, engine: str, repeats: int) -> Row:
    with TemporaryDirectory() as folder:
        config = make_config(Path(folder), model, engine)
        policy = random_policy(config)
        buckets = plan(policy.hf_specs(torch.bfloat16), BUCKET_BYTES)
        pieces = [sum(spec.dtype.itemsize * int(np.prod(spec.shape)) for spec in specs) for specs in buckets]
        with Bare(pieces) as bare, learner(config) as service, actor(engine, config, service, "first"):
            publisher = Publisher(config, policy, service, 0, PROBE)
            _published(publisher, service, 1)  # makes the group
            timings, bare_s, beside_s, buffers = [], [], [], Buffers()
            for version in range(2, repeats + 2):
                bare_s.append(bare.seconds())
                gathering = Background(lambda: _gather(policy, buffers))
                beside_s.append(bare.seconds())
                gathering.result(TIMEOUT_S)
                timings.append(_timed(publisher, service, version))
            with actor(engine, config, service, "late"):
                service.told.clear()
                joined = publisher.serve(repeats + 1)
                assert [member.name for member in joined.members] == ["late"]
                join_stall_s = service.stall_s("first")
                next_stall_s = _timed(publisher, service, repeats + 2).stall_s
                publisher.shutdown()
                service.stop("measured")
    medians = {name: statistics.median(asdict(timing)[name] for timing in timings) for name in asdict(timings[0])}
    mib, bare_median_s, beside_median_s = sum(pieces) / MIB, statistics.median(bare_s), statistics.median(beside_s)
    return Row(
        model=model,
        engine=engine,
        parameters=sum(parameter.numel() for parameter in policy.parameters()),
        mib=mib,
        buckets=len(buckets),
        publications=repeats,
        join_s=joined.seconds,
        join_stall_s=join_stall_s,
        next_stall_s=next_stall_s,
        mib_per_s=mib / medians["transfer_s"],
        bare_mib_per_s=mib / bare_median_s,
        ratio=bare_median_s / medians["transfer_s"],
        beside_mib_per_s=mib / beside_median_s,
        beside_ratio=beside_median_s / medians["transfer_s"],
        **medians,
    )


def _gather(policy: Policy, buffers: Buffers) -> None:
    for _ in gather(PolicySource(policy, torch.bfloat16, keeps=False), BUCKET_BYTES, buffers):
        """Nobody takes it."""


def _published(publisher: Publisher, service: TimedService, version: int) -> Publication:
    service.told.clear()
    publication = publisher.publish(version)
    assert len(publication.members) == len(service.members()), "the probe refused an actor"
    service.set_version(version, version)
    return publication


def _timed(publisher: Publisher, service: TimedService, version: int) -> Timing:
    publication = _published(publisher, service, version)
    return Timing(
        pause_s=service.seconds(WeightsPhase.PAUSE),
        transfer_s=publication.costs.send_s,
        load_s=service.seconds(*DELIVERY) - publication.costs.send_s,
        publication_s=publication.seconds,
        stall_s=service.stall_s("first"),
    )


HEADER = (
    "| parameters | engine | MiB | buckets | pause s | transfer s | load s | publication s | stall s | a join s | "
    "stall of others s | stall of the next s | MiB/s | bare MiB/s | ratio | bare beside | ratio |"
)


def render(row: Row) -> str:
    seconds = (row.pause_s, row.transfer_s, row.load_s, row.publication_s, row.stall_s, row.join_s)
    return (
        f"| {row.parameters:,} | {row.engine} | {row.mib:,.2f} | {row.buckets} | "
        + " | ".join(f"{value:.3f}" for value in seconds)
        + f" | {row.join_stall_s:g} | {row.next_stall_s:.3f} | {row.mib_per_s:,.0f} | {row.bare_mib_per_s:,.0f} | "
        f"{row.ratio:.2f} | {row.beside_mib_per_s:,.0f} | {row.beside_ratio:.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=["150k", "3m", "135m", "500m"])
    parser.add_argument("--engine", choices=["receiver", "vllm"], default="receiver")
    parser.add_argument("--repeats", type=int, default=9, help="publications of each model")
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    options = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of the actors
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    print(HEADER, "|---" * HEADER.count(" |") + "|", sep="\n", flush=True)
    rows = []
    with quieter("learner"):
        for model in options.models:
            rows.append(measure(model, options.engine, options.repeats))
            print(render(rows[-1]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
