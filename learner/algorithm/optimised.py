"""A network together with what trains it."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.config import OptimizerConfig
from learner.checkpoint import StateDict, load_network_state, network_state


class Optimised:
    """AdamW over a network's parameters, gradients clipped over all shards.

    The learning rate of update k = 0, 1, ... is learning_rate * min(1, (k + 1) / warmup_steps).
    """

    def __init__(self, name: str, network: nn.Module, config: OptimizerConfig) -> None:
        """`name` is what errors and metrics call the network."""
        self.name, self.network, self.config = name, network, config
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
        return self.config.learning_rate * min(1.0, (self.num_updates + 1) / max(self.config.warmup_steps, 1))

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
