"""A network together with what trains it."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.config import OptimizerConfig, Schedule
from learner.algorithm.offload import HostAdamW

StateDict = dict[str, Any]  # nested; leaves are tensors, DTensors or JSON values

# An overflow in one mini-batch is over with the next one; weights or rewards that are not finite spoil all that follow.
MAX_SKIPPED_IN_A_ROW = 5

logger = logging.getLogger(__name__)


class Optimised:
    """AdamW over a network's parameters that are not frozen, gradients clipped over all shards.

    The learning rate of update k = 0, 1, ... is learning_rate * min(1, (k + 1) / warmup_steps), and with
    schedule=linear that times 1 - k / total_updates, which is 0 from there on; and whoever asks for an update may
    multiply the rate of this one. An update whose gradients are not finite is skipped, and does not count as one.
    """

    def __init__(
        self, name: str, network: nn.Module, config: OptimizerConfig, *, has_state_on_host: bool = False
    ) -> None:
        """`name` is what errors and metrics call the network."""
        self.name, self.network, self.config = name, network, config
        self.total_updates = 0  # of the whole run, as far as is known; only a schedule needs it
        self.num_updates = 0
        self.num_skipped = 0  # in all
        self.skipped_in_a_row = 0  # since the last update
        self.optimizer = (HostAdamW if has_state_on_host else torch.optim.AdamW)(
            [parameter for parameter in network.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,  # one pass over the memory, on CPU and CUDA, over shards as well
        )

    @property
    def learning_rate(self) -> float:
        """Of the next update, unless that one is told to take another step."""
        rate = self.config.learning_rate * min(1.0, (self.num_updates + 1) / max(self.config.warmup_steps, 1))
        if self.config.schedule is Schedule.linear:
            rate *= max(0.0, 1.0 - self.num_updates / max(self.total_updates, 1))
        return rate

    @property
    def last_learning_rate(self) -> float:
        """Of the last update."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def apply(self, rate_factor: float = 1.0) -> Tensor | None:
        """One update with the gradients that are there, which are then gone; their norm before clipping.

        `rate_factor` multiplies the learning rate of this update alone.
        None when the norm is not finite: weights and optimizer are left as they are, on all ranks, which have the
        same norm. A collective when sharded. Raises FloatingPointError at the last of MAX_SKIPPED_IN_A_ROW.
        """
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if is_finite := bool(torch.isfinite(norm)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate * rate_factor
            self.optimizer.step()
            self.num_updates += 1
            self.skipped_in_a_row = 0
        self.optimizer.zero_grad(set_to_none=True)
        if not is_finite:
            self._count_skipped(norm.item())
        return norm if is_finite else None

    def _count_skipped(self, norm: float) -> None:
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        logger.warning(
            "an update of the %s was skipped, its gradient norm is %s: %d in all, after %d updates",
            self.name,
            norm,
            self.num_skipped,
            self.num_updates,
        )
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"the gradients of the {self.name} were not finite {self.skipped_in_a_row} times in a row, after "
                f"{self.num_updates} updates: lower learner.{self.name}.learning_rate, or look for rewards or weights "
                "that are not finite"
            )

    def state_dict(self) -> StateDict:
        return network_state(self.network, self.optimizer) | {
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        load_network_state(self.network, self.optimizer, state_dict)
        self.num_updates = state_dict["num_updates"]
        self.num_skipped = state_dict["num_skipped"]
        self.skipped_in_a_row = state_dict["skipped_in_a_row"]


def network_state(network: nn.Module, optimizer: Optimizer) -> StateDict:
    """Parameters, optimizer state (by parameter name) and learning rates of one network, for a state dict.

    Tensors are the live ones. An optimizer that has not stepped yet gets its empty state created, so that a
    checkpoint can be read into it.
    """
    _create_state(optimizer)
    names = {parameter: name for name, parameter in network.named_parameters()}
    return {
        "parameters": {name: parameter.detach() for parameter, name in names.items()},
        "optimizer": {names[parameter]: dict(state) for parameter, state in optimizer.state.items()},
        "learning_rates": [group["lr"] for group in optimizer.param_groups],
    }


def load_network_state(network: nn.Module, optimizer: Optimizer, state: StateDict) -> None:
    """Restores what `network_state` returned. Tensors that already are the live ones are left as they are."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    with torch.no_grad():
        for parameter, name in names.items():
            parameter.copy_(state["parameters"][name])
    _create_state(optimizer)
    for parameter, entries in optimizer.state.items():
        for key, value in state["optimizer"][names[parameter]].items():
            if isinstance(value, Tensor):
                entries[key].copy_(value)
            else:
                entries[key] = value
    for group, rate in zip(optimizer.param_groups, state["learning_rates"], strict=True):
        group["lr"] = rate


def _create_state(optimizer: Optimizer) -> None:
    """Zero optimizer state: one step of size zero on zero gradients, then every entry zeroed."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for parameter, _ in gradients:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in gradients:
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for entries in optimizer.state.values():
        for value in entries.values():
            if isinstance(value, Tensor):
                value.zero_()
