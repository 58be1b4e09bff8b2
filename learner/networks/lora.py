"""LoRA (arXiv 2106.09685): what is trained are low-rank adapters of the linear layers of a frozen model.

    y = W x + scale * B A x,    A [r, in], B [out, r] (zero at first),    scale = alpha / r

PEFT makes the layers, inside the model as it is: its class, its packed attention and its hooks stay. A model carries
one adapter for each network on it, policy and with model.critic=shared_backbone the critic; one is active at a time.

Actors know nothing of adapters: what is published and exported is W + scale * B A. vLLM 0.32 would take an adapter
alone only from files on every actor's host, by a call that leaves the weight version that it stamps on tokens as it is.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from common.config import ConfigError, LoraConfig
from learner.networks.parallel import full_tensor, like

POLICY, CRITIC = "policy", "critic"  # names of adapters

Result = TypeVar("Result")


class AdaptedModel(nn.Module):
    """A frozen model with its adapters, and the heads on it: what FSDP2 shards, once for all networks on it.

    FSDP2 gathers parameters around the forward pass of one root, so the passes of every network run inside this one's.
    With activation checkpointing a backward pass repeats its forward pass under the adapter that is active then, so it
    comes before the next network's forward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.heads = nn.ModuleList()

    def forward(self, adapter: str | None, run: Callable[..., Result], *inputs: object) -> Result:
        """run(*inputs) with this adapter active; None: with the model alone."""
        self.activate(adapter)
        return run(*inputs)

    def activate(self, adapter: str | None) -> None:
        for layer in adapted_layers(self.model).values():
            # PEFT's set_adapter would also switch requires_grad, which FSDP2 reads once, when it shards.
            layer._active_adapter = [adapter]


@dataclass(frozen=True)
class Adapter:
    """A network's place on an adapted model."""

    name: str | None  # None: the model alone
    root: AdaptedModel

    def trained(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of `parameters` that belong to the network: its adapter's and, of a critic, the head's."""
        for name, parameter in parameters:
            is_other = ".lora_" in name and name.split(".")[-2] != self.name
            if parameter.requires_grad and not is_other:
                yield name, parameter


class Network(nn.Module):
    """A policy or a critic. Its parameters are all, those included that are frozen one by one (model.critic_frozen), or
    with LoRA its adapter's and its head's, which are those that it trains."""

    adapter: Adapter | None = None
    shares_prefixes = False  # what sequences of a stream have in common at their start is computed once

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        parameters = super().named_parameters(prefix, recurse, remove_duplicate)
        return parameters if self.adapter is None else self.adapter.trained(parameters)

    @property
    def root(self) -> nn.Module:
        """What FSDP2 shards: the network, or the adapted model that it is on, perhaps with another."""
        return self if self.adapter is None else self.adapter.root

    def _through_root(self, run: Callable[..., Result], *inputs: object) -> Result:
        if self.adapter is None:
            return run(*inputs)
        result: Result = self.adapter.root(self.adapter.name, run, *inputs)
        return result


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> AdaptedModel:
    """The model as the frozen part of networks to come, in the type that it computes in: it needs no master weights."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    return AdaptedModel(model)


def add_adapter(root: AdaptedModel, name: str, config: LoraConfig) -> Adapter:
    """An adapter of every layer that lora.target_modules means: float32, and without effect until it is trained.

    Raises ConfigError for names that mean no linear layer of this model.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = _targets(root.model, config.target_modules)
    peft_config = PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the second one is meant
        inject_adapter_in_model(peft_config, root.model, name)
    for path, parameter in root.model.named_parameters():
        is_adapter = ".lora_" in path
        parameter.requires_grad_(is_adapter)  # PEFT trains the adapter that came last
        if is_adapter:
            parameter.data = parameter.data.float()
    return Adapter(name, root)


def _targets(model: PreTrainedModel, names: list[str] | None) -> list[str]:
    """Full names of the linear layers to adapt, none of them the output layer."""
    modules = {path: getattr(module, "base_layer", module) for path, module in model.named_modules()}
    head = model.get_output_embeddings()
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear) and module is not head]
    linear = [path for path in linear if ".lora_" not in path and not path.endswith(".base_layer")]
    if not linear:
        raise ConfigError(
            f"lora.rank: {type(model).__name__} has no linear layers to adapt: train all of it with lora.rank=0"
        )
    if names is None:
        return linear
    for name in names:
        if not any(_ends_with(path, name) for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ConfigError(
                f"lora.target_modules: no linear layer of {type(model).__name__} but its output layer is called "
                f"{name}: choose among {', '.join(known)}"
            )
    return [path for path in linear if any(_ends_with(path, name) for name in names)]


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """PEFT's layers by the name of the layer in whose place they stand."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def merged(
    model: nn.Module, adapter: str | None, now: Callable[[str, nn.Parameter], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under the names that they have without adapters, W + scale * B A where one is, float32.

    `now` gives what stands for a parameter: itself, or what it was. Sharded tensors are merged shard by shard: rows of
    W and of B are split alike, so only A, which is small, is gathered. A collective then.
    """
    layers = adapted_layers(model)
    for name, parameter in model.named_parameters():
        path, _, leaf = name.rpartition(".base_layer.")
        if ".lora_" in name:
            continue
        if not path:
            yield name, now(name, parameter)
        elif leaf != "weight" or adapter not in layers[path].lora_A:
            yield f"{path}.{leaf}", now(name, parameter)
        else:
            a_name, b_name = (f"{path}.lora_{side}.{adapter}.weight" for side in "AB")
            a, b = layers[path].lora_A[adapter].weight, layers[path].lora_B[adapter].weight
            scale = layers[path].scaling[adapter]
            yield f"{path}.weight", _merge(now(name, parameter), now(a_name, a), now(b_name, b), scale)


def _merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight.float() + scale * (b @ a)
    assert isinstance(a, DTensor) and isinstance(b, DTensor)
    device = weight.device_mesh.device_type  # shards may rest on the host
    product = b.to_local().to(device) @ full_tensor(a, a.to_local())
    return like(weight, weight.to_local().to(device).float() + scale * product)
