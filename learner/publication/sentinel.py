"""The drift sentinel: do actor and learner still compute the same policy?

Before the policy's first update (and for ever at learning rate 0) vLLM's log-probs and the learner's can differ only
by the two engines' arithmetic. That difference is the floor. Later, `offpolicy/mismatch_abs_mean` is measured on
responses that the current version drew whole, so age explains nothing of it: when it rises to a multiple of the floor,
a tensor is not what it should be on one of the two sides.
"""

import logging

import torch
from torch import nn
from torch.distributed.tensor import DTensor

logger = logging.getLogger(__name__)

SMALLEST_FLOOR = 1e-5  # nats; a floor measured on a few short responses may be smaller by luck
NAMED_TENSORS = 6


class DriftSentinel:
    """Learns the floor while the policy does not change, and compares every later step with `factor` times it."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.floor: float | None = None  # nats per token; None until it was measured. A checkpoint holds it

    @property
    def limit(self) -> float | None:
        """Nats per token; None until a floor was measured."""
        return None if self.floor is None else self._factor * max(self.floor, SMALLEST_FLOOR)

    def observe(self, mismatch: float | None, *, is_untrained: bool, policy: nn.Module) -> dict[str, float]:
        """Metrics of this step: the floor, and 1 when the alarm sounds. `mismatch` is None when nothing was measured.

        The largest floor counts. The alarm is logged with statistics of the tensors that stand out.
        """
        if mismatch is None:
            return {}
        if is_untrained or self.floor is None:
            self.floor = max(mismatch, self.floor or 0.0)
            return {"offpolicy/mismatch_floor": self.floor, "offpolicy/mismatch_alarm": 0.0}
        assert self.limit is not None
        is_drifting = not mismatch <= self.limit
        if is_drifting:
            logger.error(
                "vLLM's log-probs differ from the learner's by %.3g nats a token on responses of the same version, "
                "the limit is %.3g (%g times the floor of the untrained model); largest tensors here: %s",
                mismatch,
                self.limit,
                self._factor,
                describe_tensors(policy),
            )
        return {"offpolicy/mismatch_floor": self.floor, "offpolicy/mismatch_alarm": float(is_drifting)}


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
