"""One part of the check, in a process of its own.

python -m benchmarks.gpu_check.parts a --device cuda --report FILE --folder FOLDER
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_check.report import Report


@dataclass(frozen=True, kw_only=True)
class Part:
    """What belongs to one part."""

    title: str
    module: str  # in this package, with `run(report, device, folder)`
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


PARTS: Mapping[str, Part] = {
    "a": Part(title="losses and gradients against the CPU", module="values", limit_s=75.0),
    "b": Part(title="packed attention against single sequences", module="attention", limit_s=45.0),
    "c": Part(
        title="process group, FSDP2, checkpoint and resume",
        module="sharded",
        limit_s=60.0,
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},  # or its products are not reproducible
    ),
    "d": Part(
        title="speed and memory of the learner's step",
        module="speed",
        limit_s=150.0,
        environment={"PYTORCH_ALLOC_CONF": "expandable_segments:True"},
    ),
    "e": Part(
        title="the demo, learner and actor on one device",
        module="demo",
        limit_s=240.0,
        environment={"VLLM_USE_FLASHINFER_SAMPLER": "0"},  # it would be compiled first; nothing here samples with top-p
    ),
    "f": Part(
        title="weights between two processes, and peers that are lost",
        module="transfer",
        limit_s=75.0,
        environment={
            "NCCL_HOSTID": "here",
            "NCCL_SOCKET_IFNAME": "lo",
            "NCCL_IB_DISABLE": "1",
            "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # from NCCL 2.30 on
        },
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="One part of the check")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what it started ends too
    report = Report(arguments.report)
    import torch

    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    module = importlib.import_module(f"benchmarks.gpu_check.{PARTS[arguments.part].module}")
    module.run(report, device, arguments.folder)
    report.complete()
    return 0


if __name__ == "__main__":
    sys.exit(main())
