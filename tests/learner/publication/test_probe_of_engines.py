"""The probe with real forward passes: the learner's packed one under FSDP2, and plain transformers as the engine."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.config import Device, DType
from common.launcher import rank_environment, reserve_port
from common.types import Float32Array, WeightsPhase, WeightsReport
from learner.networks.model import Policy, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.publication.probe import Probe
from tests.support.tiny_models import VOCAB, tiny_run, write_tiny_model

TOKENS = torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(0))
NUM_VERSIONS = 12


class Engine:
    """Transformers in the run's type, with attention and order of operations of its own. Its output layer shares the
    embedding, or is a copy that no update reaches: the trap of tied models."""

    def __init__(self, path: str, dtype: torch.dtype, *, is_stale: bool) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()
        self.head = self.model.get_output_embeddings().weight.detach()
        if is_stale:
            self.head = self.head.clone()

    @torch.no_grad()
    def load(self, weights: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(weights[name])

    @torch.no_grad()
    def score(self) -> Float32Array:
        hidden = self.model.base_model(input_ids=TOKENS[None], use_cache=False).last_hidden_state[0, :-1]
        logprobs = (hidden @ self.head.T).float().log_softmax(-1)
        return logprobs.gather(1, TOKENS[1:, None])[:, 0].numpy()


@torch.no_grad()
def train(policy: Policy, rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.parameters():
        local = getattr(parameter, "to_local", lambda parameter=parameter: parameter)()
        local.add_(torch.randn(local.shape, generator=generator) * local.square().mean().sqrt(), alpha=rate)


def ready(version: int, logprobs: Float32Array) -> WeightsReport:
    phase = WeightsPhase.RESUME
    return WeightsReport(
        command_id=0, phase=phase, version=version, error=None, is_shared=False, probe_logprobs=logprobs
    )


@pytest.mark.parametrize(("dtype", "found_by"), [(DType.float32, 1), (DType.bfloat16, NUM_VERSIONS)])
def test_right_engines_stay_and_a_tied_output_layer_that_goes_stale_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: DType, found_by: int
) -> None:
    """With the default settings, as in the recipes; in float32 at once, in bfloat16 when it is beyond the rounding."""
    path = write_tiny_model(tmp_path, is_tied=True)
    config = tiny_run(path)
    config = replace(config, model=replace(config.model, dtype=dtype))
    kind = getattr(torch, dtype.value)
    with reserve_port() as port:
        for name, value in rank_environment(0, 1, port).items():
            monkeypatch.setenv(name, value)
    with process_group(Device.cpu, timeout_s=60):
        policy = load_policy(config, torch.device("cpu"), make_mesh(config))
        engines = {name: Engine(path, kind, is_stale=name == "stale") for name in ("right", "stale")}
        probe, worst = Probe(config, TOKENS), 0.0
        for version in range(NUM_VERSIONS + 1):
            probe.measure(policy, version)
            weights = dict(policy.named_hf_parameters(kind))
            for engine in engines.values():
                engine.load(weights)
            reports = {name: ready(version, engine.score()) for name, engine in engines.items()}
            verdict = probe.judge(version, tuple(engines), reports)
            assert "right" in verdict.good, (version, verdict)
            if "stale" in verdict.refused:
                break
            worst = max(worst, verdict.difference or np.nan)
            train(policy, rate=0.02)
    assert 1 <= version <= found_by
    assert f"agreed with the learner's at version {version - 1}" in verdict.refused["stale"]
    assert verdict.difference is not None and verdict.difference > probe.limit > worst
