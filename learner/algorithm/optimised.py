"""A network together with what trains it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from common.config import OptimizerConfig, Schedule

StateDict = dict[str, Any]  # nested; leaves are tensors, DTensors or JSON values


class Optimised:
    """AdamW over a network's parameters, gradients clipped over all shards.

    The learning rate of update k = 0, 1, ... is learning_rate * min(1, (k + 1) / warmup_steps), and with
    schedule=linear that times 1 - k / total_updates, which is 0 from there on.
    """

    def __init__(self, name: str, network: nn.Module, config: OptimizerConfig, total_updates: int) -> None:
        """`name` is what errors and metrics call the network; `total_updates` is at most how many the run makes."""
        self.name, self.network, self.config, self.total_updates = name, network, config, total_updates
        self.num_updates = 0
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
        )

    @property
    def learning_rate(self) -> float:
        """Of the next update."""
        rate = self.config.learning_rate * min(1.0, (self.num_updates + 1) / max(self.config.warmup_steps, 1))
        if self.config.schedule is Schedule.linear:
            rate *= max(0.0, 1.0 - self.num_updates / max(self.total_updates, 1))
        return rate

    def apply(self) -> Tensor:
        """One update with the gradients that are there, which are then gone; their norm before clipping.

        A collective when sharded. Raises FloatingPointError when the norm is not finite; nothing is updated
        then.
        """
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.max_grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"the gradient norm of the {self.name} is {norm.item()} after {self.num_updates} updates, "
                f"nothing was updated: lower learner.{self.name}.learning_rate"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_updates += 1
        return norm

    def state_dict(self) -> StateDict:
        return {**network_state(self.network, self.optimizer), "num_updates": self.num_updates}

    def load_state_dict(self, state_dict: StateDict) -> None:
        load_network_state(self.network, self.optimizer, state_dict)
        self.num_updates = state_dict["num_updates"]


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
