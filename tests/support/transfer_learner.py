"""The learner's side of a publication in a process of its own: the real service and publisher, one rank.

    python -m tests.support.transfer_learner MODEL_FOLDER HOST NUM_ACTORS RUN_DIR

Writes RUN_DIR/endpoint, publishes twice to actors of tests/support/transfer_process.py, and prints the names that it
reached each time.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from common.config import ActorsConfig, RolloutConfig, TransportConfig, WeightsConfig
from common.types import Prompt
from learner.networks.model import load_policy
from learner.publication.publisher import Publisher
from learner.rollouts.service import LearnerService
from tests.support.fake_actors import FINGERPRINTS
from tests.support.tiny_models import tiny_run
from tests.support.transfer_process import PROBE


def main(folder: str, host: str, num_actors: str, run_dir: str) -> None:
    torch.set_num_threads(1)
    config = replace(
        tiny_run(folder),
        rollout=RolloutConfig(prompts_per_step=1, group_size=2, max_tokens=8),
        actors=ActorsConfig(start_timeout_s=120.0),
        weights=WeightsConfig(timeout_s=60.0),
        transport=TransportConfig(host=host, heartbeat_s=0.2, heartbeat_timeout_s=20.0),
    )
    policy = load_policy(config, torch.device("cpu"), None)
    prompts = [Prompt(uid="p", text="", reference="")]
    with LearnerService(config, prompts, lambda prompt: [1], FINGERPRINTS, PROBE.tolist()) as service:
        (Path(run_dir) / "endpoint.tmp").write_text(service.endpoint)
        (Path(run_dir) / "endpoint.tmp").rename(Path(run_dir) / "endpoint")
        service.wait_for_members(int(num_actors), 240.0)
        publisher = Publisher(config, policy, service, 0, PROBE, bucket_bytes=12_000)
        for version in (1, 2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.0 + 0.1 * version)
            publication = publisher.publish(version)
            service.set_version(version, version)
            print(version, *(member.name for member in publication.members), flush=True)
        publisher.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
