"""The drift sentinel: do actor and learner still compute the same policy?

Before the policy's first update (and for ever at learning rate 0) vLLM's log-probs and the learner's can differ only
by the two engines' arithmetic. That difference is the floor. Later, `offpolicy/mismatch_abs_mean` is measured on
responses that the current version drew whole, in the first step after its publication only, so age explains nothing of
it: when it rises to a multiple of the floor, a tensor is not what it should be on one of the two sides.

A floor is only believed as far as arithmetic goes. Measured: a right engine is 5e-7 to 3e-6 nats a token off in
float32, and in bfloat16 0.037 on text and 0.067 on random tokens; of the engines that were wrong from the start the
closest was 1.2 off (another temperature, attention without its soft-cap, an old output layer: 1.2 to 5.5).
"""

import logging
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from common.config import ConfigError, DType

logger = logging.getLogger(__name__)

# Nats a token: the largest difference that can be arithmetic. Four times bfloat16's largest; float32 leaves room for
# kernels that round their products to 10 bits (TF32).
LARGEST_FLOOR = {DType.float32: 0.01, DType.bfloat16: 0.25}
SMALLEST_FLOOR = 1e-5  # nats; a floor measured on a few short responses may be smaller by luck
NAMED_TENSORS = 6


class DriftSentinel:
    """Learns the floor while the policy does not change, and compares every later step with `factor` times it.

    No floor and no limit is above LARGEST_FLOOR of the type that the engine computes in.
    """

    def __init__(self, factor: float, dtype: DType) -> None:
        self._factor = factor
        self._dtype = dtype
        self.floor: float | None = None  # nats per token; None until it was measured. A checkpoint holds it

    @property
    def limit(self) -> float | None:
        """Nats per token; None until a floor was measured."""
        if self.floor is None:
            return None
        return min(self._factor * max(self.floor, SMALLEST_FLOOR), LARGEST_FLOOR[self._dtype])

    def observe(self, mismatch: float | None, *, is_untrained: bool, policy: nn.Module) -> dict[str, float]:
        """Metrics of this step: the floor, and 1 when the alarm sounds. `mismatch` is None when nothing was measured.

        The largest floor counts. The alarm is logged with statistics of the tensors that stand out.

        Raises ConfigError when the untrained policy is another one in the engine: no step would mean anything.
        """
        if mismatch is None:
            return {}
        if is_untrained and not mismatch <= LARGEST_FLOOR[self._dtype]:
            raise ConfigError(
                f"vLLM's log-probs of the untrained model differ from the learner's by {mismatch:.3g} nats a token, "
                f"and with model.dtype={self._dtype} arithmetic explains at most {LARGEST_FLOOR[self._dtype]:g}: the "
                "two do not compute the same policy, so check model.path and the rollout settings"
            )
        if is_untrained or (self.floor is None and math.isfinite(mismatch)):
            self.floor = max(mismatch, self.floor or 0.0)
        limit = self.limit or LARGEST_FLOOR[self._dtype]
        is_drifting = not is_untrained and not mismatch <= limit
        if is_drifting:
            logger.error(
                "vLLM's log-probs differ from the learner's by %.3g nats a token on responses of the same version, "
                "the limit is %.3g (%g times the floor %.3g, or what arithmetic explains); largest tensors here: %s",
                mismatch,
                limit,
                self._factor,
                self.floor or 0.0,
                describe_tensors(policy),
            )
        return {"offpolicy/mismatch_floor": self.floor or 0.0, "offpolicy/mismatch_alarm": float(is_drifting)}


@torch.no_grad()
def describe_tensors(network: nn.Module) -> str:
    """Tensors with values that are not finite first, then those of the largest magnitude: name, rms, largest value.

    Of a sharded network, this rank's shards.
    """
    rows: list[tuple[int, float, str]] = []
    for name, parameter in network.named_parameters():
        tensor = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).float()
        if tensor.numel() == 0:
            continue
        num_bad = int((~tensor.isfinite()).sum())
        largest = float(tensor.nan_to_num(posinf=0.0, neginf=0.0).abs().max())
        rms = float(tensor.square().mean().sqrt())
        bad = f", {num_bad} not finite" if num_bad else ""
        rows.append((num_bad, largest, f"{name} rms {rms:.3g} max {largest:.3g}{bad}"))
    rows.sort(key=lambda row: (-row[0], -row[1]))
    return "; ".join(text for _, _, text in rows[:NAMED_TENSORS])
