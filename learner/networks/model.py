"""The two networks of the learner: a policy (any Hugging Face causal language model) and a critic, which has a backbone
of its own or, with model.critic=shared_backbone, an adapter on the policy's (learner/networks/lora.py).

Both are called through forward, on packed streams (learner/algorithm/packing.py), so that FSDP2's hooks run. With a
mesh every decoder layer, the embedding, the output layer and the root are sharded by `fully_shard`: float32 master
weights and reductions, compute in model.dtype, gradients SUMMED over ranks (losses are already divided by global
counts). Without a mesh they are plain modules; see learner/networks/parallel.py for when.

An empty micro-batch runs on one dummy sequence and returns empty tensors that still reach every parameter:
call backward on a SUM over them and the same collectives run with zero gradients.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from common.config import AdvantageEstimator, Config, ConfigError, CriticFrozen, CriticNetwork
from learner.networks import lora
from learner.networks.logprobs import token_logprobs
from learner.networks.parallel import full_tensor, like, refusals_of_any_rank
from learner.networks.pretrained import as_stored, load_causal_lm, load_value_model, read_config, stored_names
from learner.networks.reading import read
from learner.networks.reference import check_hidden_states, check_logprobs
from learner.networks.sharding import compute_type, place


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What a published tensor looks like, known without gathering it."""

    name: str  # as in a Hugging Face checkpoint
    dtype: torch.dtype
    shape: tuple[int, ...]


class Policy(lora.Network):
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
        inputs = (token_ids_S, cu_seqlens_B1, prompt_lengths_B, temperature, with_entropy)
        return self._through_root(self._logprobs, *inputs)

    def _logprobs(
        self,
        token_ids_S: Tensor,
        cu_seqlens_B1: Tensor,
        prompt_lengths_B: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        inputs = (token_ids_S, cu_seqlens_B1, prompt_lengths_B, self.shares_prefixes)
        reading = read(self.model.base_model, *inputs)
        logprobs_U, entropy_U = self.model.get_output_embeddings().token_logprobs(
            reading.hidden_UD,
            reading.targets_U,
            temperature=temperature,
            chunk_tokens=self.chunk_tokens,
            with_entropy=with_entropy,
        )
        outputs = _outputs if len(prompt_lengths_B) else _emptied
        entropy_T = None if entropy_U is None else outputs(reading.per_token(entropy_U))
        return outputs(reading.per_token(logprobs_U)), entropy_T

    def hf_specs(self, dtype: torch.dtype | None = None) -> list[TensorSpec]:
        """Names, types and shapes of what `named_hf_parameters` yields, in its order, without a gather."""
        return [replace(spec, dtype=dtype or spec.dtype) for specs in self._stored.values() for spec in specs]

    @torch.no_grad()
    def named_hf_parameters(
        self, dtype: torch.dtype | None = None, held: Mapping[str, Tensor] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """(checkpoint name, full tensor) one at a time, where the policy computes; a tied head is left out.
        Parameters that fuse several tensors of the checkpoint (experts) come apart again. `held`: see named_shards.

        A collective when sharded: every rank iterates to the end, in lockstep. `dtype` casts (None: master
        type). The tensor may alias the parameter: copy what must outlive the next optimizer step.
        """
        yield from self.as_stored(_full_tensors(self.named_shards(held), dtype))

    def named_shards(self, held: Mapping[str, Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The model's parameters as they are published, an adapter merged into what it adapts, sharded or not as the
        policy is; under their own names. A collective when sharded.

        `held` has this rank's parts of all parameters that the policy trains, by name, as they were.
        """

        def now(name: str, parameter: nn.Parameter) -> Tensor:
            was = None if held is None else held.get(f"model.{name}")
            if was is None:
                return parameter.detach()
            return like(parameter, was) if isinstance(parameter, DTensor) else was.to(parameter.device)

        if self.adapter is not None:
            return lora.merged(self.model, self.adapter.name, now)
        return ((name, now(name, parameter)) for name, parameter in self.model.named_parameters())

    def initial(self) -> "Policy":
        """The policy as it was before training: the same model with its adapter off."""
        assert self.adapter is not None, "a policy that trains all of its weights has changed them"
        policy = copy.copy(self)
        policy.adapter = replace(self.adapter, name=None)
        return policy

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


class Critic(lora.Network):
    """V(state) for every response token: a backbone and a scalar head that starts at zero.

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
        return self._through_root(self._values, token_ids_S, cu_seqlens_B1, prompt_lengths_B)

    def _values(self, token_ids_S: Tensor, cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        reading = read(self.backbone, token_ids_S, cu_seqlens_B1, prompt_lengths_B, self.shares_prefixes)
        values_T = reading.per_token(self.head(reading.hidden_UD))
        return _outputs(values_T) if len(prompt_lengths_B) else _emptied(values_T)

    def named_shards(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters, an adapter merged, sharded or not, named as in transformers' sequence classification."""
        parameters: Iterable[tuple[str, Tensor]] = self.backbone.named_parameters()
        if self.adapter is not None:
            parameters = lora.merged(self.backbone, self.adapter.name, lambda _, parameter: parameter.detach())
        prefix = self.backbone.base_model_prefix
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in parameters)
        yield "score.weight", self.head.weight

    @torch.no_grad()
    def named_hf_parameters(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The full tensors of `named_shards`, as Policy.named_hf_parameters yields its own."""
        for name, tensor in _full_tensors(self.named_shards(), dtype):
            yield from as_stored(self.backbone, name, tensor).items()


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What a run's algorithm needs, ready to train."""

    policy: Policy
    critic: Critic | nn.ModuleList | None  # None without algorithm.advantage=gae; a list of several
    reference: Policy | None  # the initial policy; None without algorithm.kl_weight


def load_networks(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Networks:
    """Raises ConfigError for a folder that cannot be trained."""
    critic, reference = None, None
    if config.model.critic is CriticNetwork.shared_backbone:
        policy, critic = _load_on_one_backbone(config, device, mesh)
    else:
        policy = load_policy(config, device, mesh)
        if config.algorithm.advantage is AdvantageEstimator.gae:
            critic = load_critics(config, device, mesh)
    if config.algorithm.kl_weight > 0:
        reference = load_policy(config, device, mesh) if policy.adapter is None else policy.initial()
    return Networks(policy=policy, critic=critic, reference=reference)


def load_policy(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Policy:
    """The policy of model.path, ready to train. Raises ConfigError for a folder that cannot be trained."""
    with refusals_of_any_rank(mesh is None):
        policy = _read_policy(config, mesh)
    place(policy.root, policy.model, (), config, device, mesh)
    return policy


def load_critic(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Critic:
    """The critic with its own backbone: from model.critic_path, else a copy of the policy's under a zero head."""
    with refusals_of_any_rank(mesh is None):
        critic = _read_critic(config, mesh)
    place(critic.root, critic.backbone, (critic.head,), config, device, mesh)
    return critic


def load_critics(config: Config, device: torch.device, mesh: DeviceMesh | None) -> Critic | nn.ModuleList:
    """The critic, or with model.num_critics above 1 a list of so many: alike at first, each sharded by itself."""
    if config.model.num_critics == 1:
        return load_critic(config, device, mesh)
    return nn.ModuleList(load_critic(config, device, mesh) for _ in range(config.model.num_critics))


def _load_on_one_backbone(config: Config, device: torch.device, mesh: DeviceMesh | None) -> tuple[Policy, Critic]:
    with refusals_of_any_rank(mesh is None):
        policy = _read_policy(config, mesh)
        assert policy.adapter is not None
        critic = Critic(policy.model.base_model)
        critic.shares_prefixes = policy.shares_prefixes
        critic.adapter = lora.add_adapter(policy.adapter.root, lora.CRITIC, config.lora)
        critic.adapter.root.heads.append(critic.head)
    place(policy.root, policy.model, (critic.head,), config, device, mesh)
    return policy, critic


def _read_policy(config: Config, mesh: DeviceMesh | None) -> Policy:
    """Checked, but not yet where it belongs."""
    path, reads = config.model.path, _reads_weights(mesh)
    model = load_causal_lm(path, config.model.tie_word_embeddings, reads, config.model.trust_remote_code)
    policy = Policy(model, config.learner.logprob_chunk_tokens)
    _set_to_train(policy, model, config)
    if reads:
        _check_names(policy, path)
        check_logprobs(model, lambda *packed: policy(*packed, 1.0)[0], config.model.max_model_len, path)
    if config.lora.rank > 0:
        policy.adapter = lora.add_adapter(lora.freeze(model, compute_type(config)), lora.POLICY, config.lora)
    return policy


def _read_critic(config: Config, mesh: DeviceMesh | None) -> Critic:
    path, reads = config.model.critic_path or config.model.path, _reads_weights(mesh)
    trust = config.model.trust_remote_code
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
    if config.model.critic_frozen is CriticFrozen.attention:
        _freeze_attention(backbone)
    if reads:
        check_hidden_states(
            backbone, lambda *packed: read(backbone, *packed).hidden_UD, config.model.max_model_len, path
        )
    if config.lora.rank > 0:
        critic.adapter = lora.add_adapter(lora.freeze(backbone, compute_type(config)), lora.CRITIC, config.lora)
        critic.adapter.root.heads.append(critic.head)
    return critic


def _full_tensors(parameters: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
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


def _set_to_train(network: lora.Network, hf_model: PreTrainedModel, config: Config) -> None:
    """Dropout off, activation checkpointing and shared prefixes as configured."""
    network.shares_prefixes = config.learner.share_prefixes
    for module in hf_model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "dropout" in name and isinstance(value, float):  # a probability for torch.nn.functional.dropout
                setattr(module, name, 0.0)
    if config.learner.activation_checkpointing:
        _checkpoint_every(config.learner.activation_checkpointing, hf_model)
    network.train()


def _freeze_attention(backbone: PreTrainedModel) -> None:
    """SAO (arXiv 2607.07508, section 3.2): the attention stays; MLPs, norms, embedding and head are trained."""
    layers = [module for module in backbone.modules() if type(module).__name__.endswith("Attention")]
    if not layers:
        raise ConfigError(
            f"model.critic_frozen=attention finds no attention in {type(backbone).__name__}: set it to none, or choose "
            "another model.critic_path"
        )
    for layer in layers:
        layer.requires_grad_(False)


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
