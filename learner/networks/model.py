"""The two networks of the learner: a policy (any Hugging Face causal language model) and a separate critic.

Both are called through forward, on packed streams (learner/algorithm/packing.py), so that FSDP2's hooks run. With a
mesh every decoder layer, the embedding, the output layer and the root are sharded by `fully_shard`: float32 master
weights and reductions, compute in model.dtype, gradients SUMMED over ranks (losses are already divided by global
counts). Without a mesh they are plain modules; see learner/networks/parallel.py for when.

An empty micro-batch runs on one dummy sequence and returns empty tensors that still reach every parameter:
call backward on a SUM over them and the same collectives run with zero gradients.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.config import Config, ConfigError, Device, DType, Offload
from learner.algorithm.packing import prediction_positions
from learner.networks.attention import Packing, hide_from_compiler
from learner.networks.logprobs import token_logprobs
from learner.networks.parallel import refusals_of_any_rank
from learner.networks.pretrained import as_stored, load_causal_lm, load_value_model, read_config, stored_names
from learner.networks.reference import check_hidden_states, check_logprobs

Network = TypeVar("Network", "Policy", "Critic")

DUMMY_LENGTH = 2  # one prompt token and one response token stand in for an empty micro-batch


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a published tensor looks like, known without gathering it."""

    name: str  # as in a Hugging Face checkpoint
    dtype: torch.dtype
    shape: tuple[int, ...]


class Policy(nn.Module):
    """The language model that is trained. `model` is the Hugging Face module; parameter names are its own."""

    def __init__(self, model: PreTrainedModel, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        head = model.get_output_embeddings()
        head.token_logprobs = MethodType(_head_logprobs, head)
        self._stored = {name: _stored_specs(model, name, p) for name, p in model.named_parameters()}

    @property
    def config(self) -> PreTrainedConfig:
        return self.model.config

    def forward(
        self,
        token_ids_S: Tensor,
        cu_seqlens_B1: Tensor,
        prompt_lengths_B: Tensor,
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(logprobs_T, entropy_T): float32, nats, of each response token's distribution at `temperature`.

        Inputs may live on the CPU. The entropy is None unless `with_entropy`; it carries a gradient.
        """
        token_ids_S, hidden_TD, positions_T = _run(self.model.base_model, token_ids_S, cu_seqlens_B1, prompt_lengths_B)
        logprobs_T, entropy_T = self.model.get_output_embeddings().token_logprobs(
            hidden_TD,
            token_ids_S[positions_T + 1],
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            with_entropy=with_entropy,
        )
        outputs = _outputs if len(prompt_lengths_B) else _emptied
        return outputs(logprobs_T), None if entropy_T is None else outputs(entropy_T)

    def hf_specs(self, dtype: torch.dtype | None = None) -> list[TensorSpec]:
        """Names, types and shapes of what `named_hf_parameters` yields, in its order, without a gather."""
        specs = [spec for name, _ in self.model.named_parameters() for spec in self._stored[name]]
        return [replace(spec, dtype=dtype or spec.dtype) for spec in specs]

    @torch.no_grad()
    def named_hf_parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, full tensor) one at a time, where the policy computes; a tied head is left out.
        Parameters that fuse several tensors of the checkpoint (experts) come apart again.

        A collective when sharded: every rank iterates to the end, in lockstep. `dtype` casts (None: master
        type). The tensor may alias the parameter: copy what must outlive the next optimizer step.
        """
        yield from self.as_stored(_full_tensors(self.model.named_parameters(), dtype))

    def as_stored(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, tensor) of full tensors that come under the parameters' own names."""
        for name, tensor in tensors:
            is_whole = [spec.name for spec in self._stored[name]] == [name]
            yield from ((name, tensor),) if is_whole else as_stored(self.model, name, tensor).items()


class ValueHead(nn.Linear):
    """A scalar of each hidden state, float32: values differ by less than bfloat16 resolves."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 1, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T,). As a forward pass of its own, so that FSDP gathers the head by itself, and in float32."""
        return hidden_TD.float() @ self.weight[0]


class Critic(nn.Module):
    """V(state) for every response token: its own backbone and a scalar head that starts at zero.

    The head has no bias, like those of transformers' value and reward models, so that either reads the other's.
    """

    def __init__(self, backbone: PreTrainedModel, head_weight: Tensor | None = None) -> None:
        """`head_weight` [1, D] is a pretrained head; None starts at V = 0 everywhere."""
        super().__init__()
        self.backbone = backbone
        self.head = ValueHead(backbone.config.hidden_size)
        nn.init.zeros_(self.head.weight)
        if head_weight is not None:
            self.head.weight.data.copy_(head_weight)

    def forward(self, token_ids_S: Tensor, cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        """values_T: float32, the value of the state in which each response token is chosen (the position
        before it).

        The head computes in float32 whatever the backbone's type.
        """
        _, hidden_TD, _ = _run(self.backbone, token_ids_S, cu_seqlens_B1, prompt_lengths_B)
        values_T = self.head(hidden_TD)
        return _outputs(values_T) if len(prompt_lengths_B) else _emptied(values_T)

    def hf_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters as they are (sharded or not) under the names of transformers' sequence classification."""
        prefix = self.backbone.base_model_prefix
        backbone = {f"{prefix}.{name}": parameter for name, parameter in self.backbone.named_parameters()}
        return backbone | {"score.weight": self.head.weight}

    @torch.no_grad()
    def named_hf_parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The full tensors of `hf_parameters`, as Policy.named_hf_parameters yields its own."""
        for name, tensor in _full_tensors(self.hf_parameters().items(), dtype):
            yield from as_stored(self.backbone, name, tensor).items()


def load_policy(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Policy:
    """The policy of model.path, ready to train. Raises ConfigError for a folder that cannot be trained."""
    path, reads, trust = config.model.path, _reads_weights(mesh), config.model.trust_remote_code
    with refusals_of_any_rank(mesh is None):
        model = load_causal_lm(path, config.model.tie_word_embeddings, reads, trust)
        policy = Policy(model, config.learner.logprob_chunk_tokens)
        _set_to_train(policy, model, config)
        if reads:
            _check_names(policy, path)
            check_logprobs(model, lambda *packed: policy(*packed, 1.0)[0], config.model.max_model_len, path)
    return _place(policy, model, config, device, mesh)


def load_critic(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Critic:
    """The critic: from model.critic_path, else a copy of the policy's backbone under a zero head."""
    path, reads = config.model.critic_path or config.model.path, _reads_weights(mesh)
    trust = config.model.trust_remote_code
    with refusals_of_any_rank(mesh is None):
        if config.model.critic_path is None:
            backbone, head = load_causal_lm(path, None, reads, trust).base_model, None
        else:
            backbone, head = load_value_model(path, reads, trust)
            known, needed = backbone.config.vocab_size, read_config(config.model.path, trust).vocab_size
            if known < needed:
                raise ConfigError(
                    f"model.critic_path={path} knows {known} tokens, the policy has {needed}: choose a critic with the "
                    "policy's tokenizer"
                )
        critic = Critic(backbone, head)
        _set_to_train(critic, backbone, config)
        if reads:
            check_hidden_states(backbone, lambda *packed: _run(backbone, *packed)[1], config.model.max_model_len, path)
    return _place(critic, backbone, config, device, mesh)


def full_tensor(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole of a parameter from `shard`, every rank's own part of it in any type and place, or all of it when
    `parameter` is not sharded; where the network computes. A collective when sharded.
    """
    if not isinstance(parameter, DTensor):
        return shard.to(parameter.device)
    mesh = parameter.device_mesh  # an offloaded shard is in host memory, and NCCL sends none of that
    local = shard.to(mesh.device_type)
    shape, stride = parameter.shape, parameter.stride()
    whole = DTensor.from_local(local, mesh, parameter.placements, run_check=False, shape=shape, stride=stride)
    return whole.full_tensor()


def _full_tensors(
    parameters: Iterable[tuple[str, nn.Parameter]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """Each shard is cast before it is gathered: less travels, and less memory is needed."""
    for name, parameter in parameters:
        shard = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        yield name, full_tensor(parameter, shard.detach().to(dtype or shard.dtype))


def _head_logprobs(
    head: nn.Linear, hidden_TD: Tensor, targets_T: Tensor, **settings: Any
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` as a method of the output layer, around which FSDP gathers the layer's own weight."""
    return token_logprobs(hidden_TD, head.weight, targets_T, **settings)


def _outputs(head_T: Tensor) -> Tensor:
    """A copy of the head's output. If it were the network's on ranks with work only, FSDP's hooks on the two would
    fire, and gather, in another order there than on the ranks without."""
    return head_T.clone()


def _emptied(dummy_T: Tensor) -> Tensor:
    """No elements, but still a function of every parameter. A copy: FSDP2 mistrusts views as outputs."""
    return dummy_T[:0].clone()


def _run(
    backbone: nn.Module, token_ids_S: Tensor, cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(token ids, hidden states [T, D], positions_T) on the device; of a dummy sequence when empty."""
    device = _device_of(backbone)
    if len(prompt_lengths_B) == 0:
        token_ids_S = token_ids_S.new_zeros(DUMMY_LENGTH)
        cu_seqlens_B1 = cu_seqlens_B1.new_tensor([0, DUMMY_LENGTH])
        prompt_lengths_B = cu_seqlens_B1.new_tensor([DUMMY_LENGTH - 1])
    token_ids_S = token_ids_S.to(device)
    packing = Packing.from_lengths(cu_seqlens_B1.diff().tolist(), device)
    positions_T = prediction_positions(cu_seqlens_B1.cpu(), prompt_lengths_B.cpu()).to(device)
    output = backbone(
        input_ids=token_ids_S[None],
        position_ids=packing.position_ids_S[None],
        use_cache=False,
        packing=packing,
    )
    return token_ids_S, output.last_hidden_state[0].index_select(0, positions_T), positions_T


def _device_of(network: nn.Module) -> torch.device:
    """Where it computes, offloaded or not."""
    parameter = next(network.parameters())
    return torch.device(parameter.device_mesh.device_type) if isinstance(parameter, DTensor) else parameter.device


def _reads_weights(mesh: DeviceMesh | None) -> bool:
    """Only rank 0 reads files; the others receive."""
    return mesh is None or dist.get_rank() == 0


def _stored_specs(model: PreTrainedModel, name: str, parameter: Tensor) -> list[TensorSpec]:
    outline = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    stored = as_stored(model, name, outline)
    return [TensorSpec(name=n, dtype=tensor.dtype, shape=tuple(tensor.shape)) for n, tensor in stored.items()]


def _check_names(policy: Policy, path: str) -> None:
    """Published names must be those of the checkpoint: the engine's loader knows no others."""
    stored = stored_names(path)
    head = policy.model.get_output_embeddings().weight  # a tied model's folder may lack it
    names = {name for name, parameter in policy.model.named_parameters() if parameter is head}
    unknown = sorted({spec.name for spec in policy.hf_specs()} - stored - names) if stored else []
    if unknown:
        raise ConfigError(
            f"model folder {path} names its weights otherwise than transformers would save them (such as "
            f"{unknown[0]}), so that they cannot be published: load it with transformers and save it again"
        )


def _set_to_train(network: nn.Module, hf_model: PreTrainedModel, config: Config) -> None:
    """Dropout off, activation checkpointing as configured."""
    for module in hf_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # a probability for torch.nn.functional.dropout
                setattr(module, name, 0.0)
    if config.learner.activation_checkpointing:
        _checkpoint_every(config.learner.activation_checkpointing, hf_model)
    network.train()


def _compile_layers(hf_model: PreTrainedModel, device: torch.device) -> None:
    """Each by itself, when it runs for the first time, so that FSDP and checkpointing are outside of what is compiled.
    The number of tokens changes with every micro-batch: compiled once for all of them."""
    compiler = os.environ.get("CXX", "g++")  # as torch looks for it
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"learner.compile=true needs a C++ compiler on CPUs, but {compiler} was not found: install it, set CXX to "
            "another one, or leave learner.compile out"
        )
    hide_from_compiler()
    for layer in _decoder_layers(hf_model):
        layer.forward = torch.compile(layer.forward, dynamic=True)  # type: ignore[method-assign]


def _checkpoint_every(n: int, hf_model: PreTrainedModel) -> None:
    """The last of every n decoder layers keeps only its input and is computed again in backward."""
    hf_model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in hf_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if n > 1 and not layers:
        raise ConfigError(
            f"learner.activation_checkpointing={n}: {type(hf_model).__name__} checkpoints all of its layers or none, "
            "set 1 or 0"
        )
    for i, layer in enumerate(layers, start=1):
        layer.gradient_checkpointing = i % n == 0


def _place(
    network: Network, hf_model: PreTrainedModel, config: Config, device: torch.device, mesh: DeviceMesh | None
) -> Network:
    """Sharded over `mesh`, or moved to `device`."""
    if config.learner.compile:
        _compile_layers(hf_model, device)
    if mesh is None:
        return network.to(device)
    full = {name: p.detach() for name, p in network.named_parameters()} if dist.get_rank() == 0 else {}
    _shard(network, hf_model, config, mesh)
    _scatter_from_rank_0(network, full, device, mesh)
    return network


def _shard(network: nn.Module, hf_model: PreTrainedModel, config: Config, mesh: DeviceMesh) -> None:
    compute = torch.bfloat16 if config.model.dtype is DType.bfloat16 else torch.float32
    precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
    is_offloaded = config.learner.offload is Offload.all  # pinned for the copies to a GPU
    offload = CPUOffloadPolicy(pin_memory=config.device is Device.cuda) if is_offloaded else OffloadPolicy()
    for module in (*_decoder_layers(hf_model), *_tables(hf_model)):
        fully_shard(module, mesh=mesh, mp_policy=precision, offload_policy=offload)
        if hasattr(module, "token_logprobs"):
            register_fsdp_forward_method(module, "token_logprobs")
    if isinstance(network, Critic):
        whole = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(network.head, mesh=mesh, mp_policy=whole, offload_policy=offload)
    # By default the root stays gathered after a forward without backward: publication and checkpoints would
    # then find compute copies in the place of the master weights.
    fully_shard(network, mesh=mesh, mp_policy=precision, offload_policy=offload, reshard_after_forward=True)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum


def _tables(hf_model: PreTrainedModel) -> list[nn.Module]:
    """Embedding and output layer, gathered only while they compute; none when they are one, which the root then has
    gathered from the first layer to the last."""
    embedding, head = hf_model.get_input_embeddings(), hf_model.get_output_embeddings()
    if head is None:
        return [embedding]
    return [] if head.weight is embedding.weight else [embedding, head]


def _decoder_layers(hf_model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that are sharded, and gathered, one at a time."""
    names = set(hf_model._no_split_modules or ())
    layers = [module for module in hf_model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigError(f"{type(hf_model).__name__} names no decoder layers to shard, choose another model")
    return layers


@torch.no_grad()
def _scatter_from_rank_0(network: nn.Module, full: dict[str, Tensor], device: torch.device, mesh: DeviceMesh) -> None:
    """Every rank's shard of every parameter and buffer from rank 0, one tensor in flight at a time."""
    for name, parameter in network.named_parameters():
        assert isinstance(parameter, DTensor)
        tensor = full[name].to(device) if full else torch.empty(parameter.shape, device=device)
        dist.broadcast(tensor, 0)
        shard = distribute_tensor(tensor, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
