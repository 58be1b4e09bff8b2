"""How much memory of a GPU a run needs, by what it is for: planned from config.json and the configuration, in bytes.

A learner's GPU holds master weights, gradients and optimizer state for the whole run and, on top, the largest of four
moments (`_moments`); an engine's GPU its weights, what one forward pass takes, and the key-value cache. Placed on one
GPU, the engine gets what the learner leaves. Axes as in common/model_shape.py.

The formulas count tensors; CONTEXT, COMMUNICATOR, WORKSPACES, GRAPHS and RESERVE are allowances for what is none of the
model's tensors (chosen, not measured).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.config import (
    ActorsConfig,
    AdvantageEstimator,
    Config,
    ConfigError,
    CriticFrozen,
    CriticNetwork,
    Device,
    DType,
    LearnerConfig,
    Offload,
)
from common.model_shape import ModelShape, read_shape

GIB = 2**30
CONTEXT = 3 * GIB // 4  # CUDA context, loaded kernels and the workspaces of libraries, per process
COMMUNICATOR = GIB  # NCCL's channels and buffers, in a process that has peers on other GPUs
WORKSPACES = GIB // 2  # of an engine's attention and sampling kernels
GRAPHS = GIB  # CUDA graphs of an engine that is compiled (actors.enforce_eager=false)
RESERVE = 0.05  # share of a GPU that is not planned with: fragmentation, and what the driver keeps
ENGINE_ALONE = 0.9  # vLLM's fraction of a GPU that an engine has for itself
ENGINE_ON_CPU = 0.3  # of RAM, beside which the key-value cache has a setting of its own (actors.cpu_kv_cache_gib)
BUCKET = 64 * 2**20  # of a publication; a larger tensor is a bucket of its own
TILE_WIDTH = 32_768  # learner/networks/logprobs.py: entries of the vocabulary whose logits exist at once
BATCHED_TOKENS = 2048  # vLLM's default of max_num_batched_tokens for AsyncLLM
MASTER = 4  # bytes of a master weight, of its gradient, and of each of AdamW's two moments

Parts = dict[str, int]  # bytes by what they are for


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What one GPU of each kind holds; on a shared one, both. Bytes throughout."""

    gpu: int  # of the device, in all
    learner: Parts  # of one rank at its peak
    resting: Parts  # the part of it that stays while actors generate and nothing trains
    engine: Parts  # of one engine's share of a GPU, without its key-value cache
    engines_per_gpu: int  # on a shared GPU; 1 on its own
    is_shared: bool
    sleeps: bool  # the engine gives its memory back while the learner trains
    kv_per_token: int
    kv_least: int  # one sequence of model.max_model_len tokens, below which vLLM does not start
    kv_wanted: int  # every sequence that can run at once, at full length
    utilization: float | None  # actors.gpu_memory_utilization as it is set

    @property
    def usable(self) -> int:
        return int(self.gpu * (1 - RESERVE))

    @property
    def engine_room(self) -> int:
        """What one engine may take of a GPU: what is set, else what the learner leaves, and no more than it can use.

        Negative when the learner alone is too large.
        """
        if self.utilization is not None:
            return int(self.gpu * self.utilization) + CONTEXT
        if not self.is_shared:
            return int(self.gpu * ENGINE_ALONE) + CONTEXT
        beside = self.resting if self.sleeps else self.learner
        left = (self.usable - sum(beside.values())) // self.engines_per_gpu
        return min(left, sum(self.engine.values()) + self.kv_wanted)

    @property
    def kv_cache(self) -> int:
        """Bytes of one engine's key-value cache on one GPU; negative when there is no room for any."""
        return self.engine_room - sum(self.engine.values())

    @property
    def gpu_memory_utilization(self) -> float:
        """vLLM's fraction of the whole GPU, in which it does not count its CUDA context."""
        return (self.engine_room - CONTEXT) / self.gpu

    @property
    def learner_fraction(self) -> float:
        """The share of a shared GPU that the learner's allocator may take: all that is not the engines'."""
        engine = CONTEXT if self.sleeps else self.engine_room
        return 1 - (self.engines_per_gpu * engine + self.resting["context"]) / self.gpu

    @property
    def shortage(self) -> int:
        """Bytes by which a GPU is too small, or the engine's share of it; 0 when everything fits."""
        least, learner = sum(self.engine.values()) + self.kv_least, sum(self.learner.values())
        if not self.is_shared:
            return max(0, learner - self.usable, least - self.engine_room)
        is_set = self.utilization is not None
        engines = self.engines_per_gpu * (max(least, self.engine_room) if is_set else least)
        beside = sum(self.resting.values()) if self.sleeps else learner
        asleep = learner + self.engines_per_gpu * CONTEXT
        return max(0, beside + engines - self.usable, asleep - self.usable, least - self.engine_room if is_set else 0)


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The sizes of the networks of a run."""

    policy: ModelShape
    critic: ModelShape | None  # what it starts from; None without one


def read_shapes(config: Config) -> Shapes:
    """From config.json of model.path and model.critic_path. Raises ConfigError when that does not give them."""
    policy = read_shape(config.model.path, config.model.tie_word_embeddings)
    if config.algorithm.advantage is not AdvantageEstimator.gae:
        return Shapes(policy=policy, critic=None)
    path = config.model.critic_path
    return Shapes(policy=policy, critic=policy if path is None else read_shape(path))


def plan_memory(config: Config, shapes: Shapes, gpu: int) -> MemoryPlan:
    """The plan of a run on GPUs of `gpu` bytes each; `actors.placement` says whether they are shared."""
    actors = config.actors
    resting = _resting(config, shapes)
    per_token = _kv_per_token(config, shapes.policy)
    return MemoryPlan(
        gpu=gpu,
        learner=resting | _training(config, shapes),
        resting=resting,
        engine=engine_parts(config, shapes.policy),
        engines_per_gpu=max(actors.count, 1) if config.is_shared else 1,
        is_shared=config.is_shared,
        sleeps=actors.sleep_while_training,
        kv_per_token=per_token,
        kv_least=per_token * config.model.max_model_len,
        kv_wanted=per_token * config.model.max_model_len * num_sequences(config),
        utilization=actors.gpu_memory_utilization,
    )


def refuse_shortage(config: Config, shapes: Shapes, gpu: int) -> MemoryPlan:
    """The plan. Raises ConfigError with the numbers, and the settings that help most, when something does not fit."""
    plan = plan_memory(config, shapes, gpu)
    if plan.shortage == 0:
        return plan
    roles = {"the learner": plan.learner, "an engine": plan.engine | {"key-value cache": plan.kv_least}}
    needs = [f"{role} needs {_gib(sum(parts.values()))} ({_listed(parts)})" for role, parts in roles.items()]
    remedies = [f"{setting} (-{_gib(saved)})" for setting, saved in _remedies(config, shapes, plan)[:3]]
    raise ConfigError(
        f"{_gib(plan.shortage)} too little memory on {'one shared GPU' if plan.is_shared else 'a GPU'} of "
        f"{_gib(plan.gpu)}, of which {_gib(plan.usable)} are planned with: {', and '.join(needs)}; set "
        + (" or ".join(remedies) if remedies else "a smaller model.path, or use a larger GPU")
    )


def utilization(config: Config) -> float:
    """vLLM's fraction of the device's memory (of RAM on a CPU) for one engine: what is set, else the usual."""
    if config.actors.gpu_memory_utilization is not None:
        return config.actors.gpu_memory_utilization
    return ENGINE_ON_CPU if config.device is Device.cpu else ENGINE_ALONE


def num_sequences(config: Config) -> int:
    """Sequences that one actor samples at the same time, at most."""
    held = config.actors.groups_in_flight * config.rollout.group_size
    return held if config.actors.max_num_seqs is None else min(held, config.actors.max_num_seqs)


def engine_parts(config: Config, model: ModelShape) -> Parts:
    """What one GPU of an engine holds besides the key-value cache.

    Weights in model.dtype, split over the tensor-parallel GPUs. Activations of vLLM's profiling run: BATCHED_TOKENS
    tokens through one MLP (gate and up together, their product, hidden state and residual), or the sampler's logits:
    one row per sequence, once in model.dtype and three times in float32 (logits, log-probs, a sorted copy).
    """
    size, width = _size(config), config.actors.tensor_parallel_size
    tokens = max(BATCHED_TOKENS, num_sequences(config))
    mlp = 3 * model.mlp_width * model.active_experts // width
    forward = tokens * size * (mlp + 3 * model.width + (model.query_width + 2 * model.kv_width) // width)
    sampler = num_sequences(config) * model.vocab * (size + 3 * 4)
    return {
        "weights": size * model.parameters // width,
        "activations": max(forward, sampler),
        "incoming weights": 2 * max(BUCKET, size * model.embedding),
        "workspaces": WORKSPACES + (COMMUNICATOR if width > 1 else 0) + (0 if config.actors.enforce_eager else GRAPHS),
        "context": CONTEXT,
    }


def _kv_per_token(config: Config, model: ModelShape) -> int:
    """Keys and values of one token in all layers, on one GPU: 2 L K, heads split over the tensor-parallel GPUs."""
    split = min(config.actors.tensor_parallel_size, model.kv_heads)
    return 2 * model.layers * model.kv_width * _size(config) // split


def _resting(config: Config, shapes: Shapes) -> Parts:
    """What a rank holds between two steps: float32 master weights and AdamW's two moments, sharded (ZeRO, arXiv
    1910.02054, section 3.1), and the reference policy. With LoRA the frozen models, in model.dtype, one of which is the
    reference."""
    critic, has_adapters = shapes.critic, config.lora.rank > 0
    heads = config.model.num_critics * critic.width if critic is not None else 0
    trained = sum(_trained(config, shapes)) + heads
    share = config.learner.ranks // config.learner.replicas
    policy = shapes.policy.parameters
    reference = policy if config.algorithm.kl_weight > 0 and not has_adapters else 0
    backbone = critic.backbone if critic is not None and config.model.critic is CriticNetwork.separate else 0
    frozen = policy + backbone if has_adapters else 0
    parts = {
        "frozen parameters": _size(config) * frozen // share,
        "parameters": MASTER * (trained + _frozen_attention(config, critic)) // share,
        "optimizer": 2 * MASTER * trained // share,
        "reference": MASTER * reference // share,
        "context": CONTEXT + (COMMUNICATOR if config.learner.ranks > 1 else 0),
    }
    if config.learner.offload is not Offload.none:
        parts["optimizer"] = 0
    if config.learner.offload is Offload.all:
        parts |= {"frozen parameters": 0, "parameters": 0, "reference": 0}
    return {name: size for name, size in parts.items() if size}


def _trained(config: Config, shapes: Shapes) -> tuple[int, int]:
    """Parameters that are trained in policy and critic, its head left out: all, or adapters of all linear layers, also
    where lora.target_modules names fewer."""
    policy, critic = shapes.policy, shapes.critic
    if config.lora.rank == 0:
        backbones = config.model.num_critics * critic.backbone if critic is not None else 0
        return policy.parameters, backbones - _frozen_attention(config, critic)
    in_critic = critic.layers * _trained_layer(config, critic) if critic is not None else 0
    return policy.layers * _trained_layer(config, policy), in_critic


def _frozen_attention(config: Config, critic: ModelShape | None) -> int:
    """Parameters of the critic that stay as they are, with model.critic_frozen."""
    if critic is None or config.model.critic_frozen is CriticFrozen.none:
        return 0
    return config.model.num_critics * critic.layers * critic.attention


def _trained_layer(config: Config, model: ModelShape) -> int:
    """The same of one decoder layer."""
    return config.lora.rank * model.linear_widths if config.lora.rank > 0 else model.layer


def _training(config: Config, shapes: Shapes) -> Parts:
    """What comes on top of it at the worst moment of a step: the gradients of one network, whose optimizer step frees
    them before the other's begin, and that moment's own."""
    model, critic = shapes.policy, shapes.critic
    largest = max(_trained(config, shapes))
    share = config.learner.ranks // config.learner.replicas
    gradients = 0 if config.learner.offload is Offload.all else MASTER * largest // share
    wider = model if critic is None or critic.layer <= model.layer else critic
    worst = max(_moments(config, model, wider), key=lambda parts: sum(parts.values()))
    return {"gradients": gradients} | worst


def _moments(config: Config, model: ModelShape, wider: ModelShape) -> Iterator[Parts]:
    """Candidates for the peak, with FSDP2's copies in the compute type and S = tokens_per_micro_batch. Gathered are two
    layers, the next one being on its way; of the tables, when they are one, it for the whole of forward and backward,
    because the root holds it, and else the one that computes.

    1. backward of the output layer: its gradient in float32 and in the compute type, three tiles of logits;
    2. backward of a layer: its gradients, and their float32 copy in the reduction, of two layers at once;
    3. the end of backward: the same of the embedding, without activations;
    4. publication: a bucket and the tensors that it is made of.

    With LoRA tables have no gradients, and layers those of adapters.
    """
    size, table = _size(config), model.embedding
    layers, held = 2 * size * wider.layer, size * table if model.is_tied else 0
    kept, working = activations(config, wider)
    trained_table = table if config.lora.rank == 0 else 0
    tile = MASTER * config.learner.logprob_chunk_tokens * min(model.vocab, TILE_WIDTH)
    yield {
        "activations": kept,
        "gathered layers": layers + size * table,
        "logits and their gradients": 3 * tile + (MASTER + size) * trained_table,
    }
    reduced = 2 * (size + MASTER) * _trained_layer(config, wider)
    # the output layer's gradient waits for the embedding's where they are one, and else is reduced meanwhile
    reduced += size * trained_table if model.is_tied else (size + MASTER) * trained_table
    yield {"activations": kept + working, "gathered layers": layers + held, "gradients on their way": reduced}
    yield {"gathered layers": layers + size * table, "gradients on their way": (size + MASTER) * trained_table}
    yield {"outgoing weights": 2 * max(BUCKET, size * table)}


def activations(config: Config, model: ModelShape) -> tuple[int, int]:
    """(bytes kept until backward, bytes more while one layer's backward runs) for one micro-batch of S tokens.

    A layer keeps, per token: of each of its two norms the float32 input, the normalised and the scaled state, D each
    (of norms of queries and keys not the last); query, key, value and output of attention; of the MLP gate, its
    activation, up and their product. Counted in
    transformers' code and checked against what autograd holds (tests/common/test_memory.py). Checkpointed (every n-th
    layer), it keeps its input, and one layer is computed again. Its backward has up to three gradients of the MLP's
    width at once, and two of the norms in float32.
    """
    size, tokens = _size(config), config.learner.tokens_per_micro_batch
    norms = 2 * model.width * (4 + 2 * size)
    if model.normed_width:
        norms += (model.query_width + model.kv_width) * (4 + size)
    attention = 2 * model.query_width + 2 * model.kv_width
    mlp = model.mlp_width * model.active_experts
    layer = norms + size * (attention + 4 * mlp)
    working = 3 * size * mlp + 2 * 4 * model.width
    head = (4 + 4 * size) * model.width  # last norm, the states that are predicted from, and their gradient
    every = config.learner.activation_checkpointing
    checkpointed = model.layers // every if every else 0
    kept = (model.layers - checkpointed) * layer + checkpointed * size * model.width + head
    return tokens * kept, tokens * (working + (layer if checkpointed else 0))


def _size(config: Config) -> int:
    """Bytes of a number in model.dtype."""
    return 2 if config.model.dtype is DType.bfloat16 else 4


def _remedies(config: Config, shapes: Shapes, plan: MemoryPlan) -> list[tuple[str, int]]:
    """(setting, bytes by which it lessens the shortage), best first: settings that leave the algorithm as it is."""
    learner, actors = config.learner, config.actors
    tokens = max(learner.tokens_per_micro_batch // 2, config.model.max_model_len)
    groups, sequences = max(actors.groups_in_flight // 2, 1), max(num_sequences(config) // 2, 1)
    changes: list[tuple[str, LearnerConfig, ActorsConfig]] = [
        ("learner.activation_checkpointing=1", replace(learner, activation_checkpointing=1), actors),
        (f"learner.tokens_per_micro_batch={tokens}", replace(learner, tokens_per_micro_batch=tokens), actors),
        ("learner.offload=optimizer", replace(learner, offload=Offload.optimizer), actors),
        ("learner.offload=all", replace(learner, offload=Offload.all), actors),
        (f"actors.groups_in_flight={groups}", learner, replace(actors, groups_in_flight=groups))
        if actors.max_num_seqs is None
        else (f"actors.max_num_seqs={sequences}", learner, replace(actors, max_num_seqs=sequences)),
        ("actors.gpu_memory_utilization=null", learner, replace(actors, gpu_memory_utilization=None)),
    ]
    if plan.is_shared and config.staleness.max_staleness == 0:
        changes.append(("actors.sleep_while_training=true", learner, replace(actors, sleep_while_training=True)))
    saved = [
        (setting, plan.shortage - plan_memory(replace(config, learner=a, actors=b), shapes, plan.gpu).shortage)
        for setting, a, b in changes
    ]
    return sorted((pair for pair in saved if pair[1] > 0), key=lambda pair: -pair[1])


def _listed(parts: Parts) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size >= GIB // 20)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
