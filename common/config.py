"""The run's configuration: one frozen dataclass per component, every setting with its meaning and unit.

common/loading.py reads it from files, common/validation.py refuses what cannot work.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from common.types import AnswerForm


class ConfigError(ValueError):
    """A user's mistake in the configuration; one sentence that names the value and what to do."""


class Device(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class OverAge(StrEnum):
    """What happens to a group whose oldest token is too old when it would be trained."""

    drop = "drop"  # the whole group; its prompt is sampled again
    mask = "mask"  # only the tokens that are too old leave the losses


class Batching(StrEnum):
    """Which groups make the next batch."""

    admission_order = "admission_order"  # those whose prompts were handed out first: the batch waits for each of them
    first_finished = "first_finished"  # those that came first, while no lease has to wait until it is too old


class AdvantageEstimator(StrEnum):
    gae = "gae"  # critic + generalised advantage estimation
    grpo = "grpo"  # (reward - group mean) / group std
    rloo = "rloo"  # reward - mean of the other members


class Aggregation(StrEnum):
    """How per-token policy losses become one number."""

    token = "token"  # mean over all tokens of the mini-batch (VAPO eq. 7)
    sequence = "sequence"  # mean over responses of the mean over each response's tokens (VAPO eq. 6)


class Correction(StrEnum):
    """Off-policy correction of the policy loss (see learner/algorithm/losses.py)."""

    none = "none"  # clip around pi_old, recomputed at the start of the step; what sampled the tokens is ignored
    behavior = "behavior"  # clip around pi_behavior: the field's usual baseline for stale batches
    decoupled = "decoupled"  # clip around pi_old, times min(pi_old / pi_behavior, truncation)
    tis = "tis"  # the same as decoupled
    icepop = "icepop"  # clip around pi_old, times pi_old / pi_behavior, tokens outside a band rejected
    dis = "dis"  # pi / pi_behavior times the advantage, tokens outside a band rejected; no clip
    m2 = "m2"  # clip around pi_behavior, its edges set by the second moment of the mini-batch's log-ratios


class Schedule(StrEnum):
    """The learning rate after its warm-up."""

    constant = "constant"  # VAPO
    linear = "linear"  # falls to zero over the updates of the run


class ValueTarget(StrEnum):
    gae = "gae"  # lambda-return with critic_lambda; exactly the Monte-Carlo return at critic_lambda = 1
    vtrace = "vtrace"  # off-policy corrected return (IMPALA); from the end of critic warm-up on


class KVCache(StrEnum):
    """What happens to the key-value cache of running requests at a weight update."""

    keep = "keep"
    recompute = "recompute"


class Placement(StrEnum):
    """Where actors that `train` starts live, with device=cuda."""

    auto = "auto"  # shared where fewer GPUs are visible than the roles need, else separate
    shared = "shared"  # on the learner's GPUs; weights are read in place
    separate = "separate"  # on GPUs of their own


class TransferBackend(StrEnum):
    """How weights travel to the engines (see learner/publication/transfer.py)."""

    auto = "auto"  # the one that fits device and placement; nothing else works with them
    gloo = "gloo"  # device=cpu
    ipc = "ipc"  # actors.placement=shared
    nccl = "nccl"  # actors.placement=separate


class Offload(StrEnum):
    """What of the learner rests in host memory. The numbers are the same."""

    none = "none"
    optimizer = "optimizer"  # AdamW's moments, which come over for each update: 8 bytes a parameter less on the device
    all = "all"  # parameters, gradients and moments; every layer is copied to the device for every micro-batch (FSDP)


class CriticNetwork(StrEnum):
    """What the critic's values are computed with."""

    separate = "separate"  # a network of its own, as in VAPO
    shared_backbone = "shared_backbone"  # an adapter on the policy's frozen model, and a value head; needs lora.rank


class CriticFrozen(StrEnum):
    """Which weights of the critic stay as they were loaded, in value pretraining too."""

    none = "none"
    attention = "attention"  # projections of queries, keys, values and outputs, and their norms (SAO, arXiv 2607.07508)


class ConsoleStyle(StrEnum):
    """What `train` shows while it runs."""

    auto = "auto"  # how the run stands, renewed every second, where standard output is a terminal; else as plain
    plain = "plain"  # one line a step


class TrackerName(StrEnum):
    """Who else is told of the metrics (common/trackers)."""

    wandb = "wandb"
    mlflow = "mlflow"
    trackio = "trackio"


class OnBadRow(StrEnum):
    """What happens when a row of the data cannot be used (common/tasks/rows.py lists why)."""

    error = "error"  # the first such row ends the run before it starts
    drop = "drop"  # such rows are left out, counted by reason, and listed in RUN/data/dropped.jsonl


@dataclass(frozen=True)
class ModelConfig:
    path: str = MISSING  # causal language model with its tokenizer: Hugging Face folder, or OWNER/NAME on the Hub
    critic_path: str | None = None  # what the critic starts from (`run.py export --critic` writes such folders, and
    # any value or reward model of transformers is one); None: the policy's backbone and a zero head
    critic: CriticNetwork = CriticNetwork.separate
    critic_frozen: CriticFrozen = CriticFrozen.none
    num_critics: int = 1  # V is their mean; each is trained on its part of every group (AsyPPO, arXiv 2510.01656: 2)
    trust_remote_code: bool = False  # run the Python code that a model or tokenizer brings along
    tie_word_embeddings: bool | None = None  # None: as the folder says; else share or split the output layer
    dtype: DType = DType.float32  # compute type of the learner and of generation; master weights are float32
    max_model_len: int = 256  # tokens of prompt + response; a prompt may have this less rollout.max_tokens


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on frozen models (arXiv 2106.09685): what policy and critic then train. No dropout, see
    common/loading.py."""

    rank: int = 0  # r of the adapters; 0: off, every weight is trained
    alpha: float = 32.0  # an adapter's output is scaled by alpha / rank
    target_modules: list[str] | None = None  # ends of the names of linear layers; None: all but the output layer


@dataclass(frozen=True)
class TrainFile:
    """One of several files that a training stream is mixed from."""

    path: str = MISSING  # .jsonl or .parquet
    weight: float = 1.0  # its share of the stream is weight / sum of all weights, whatever its number of rows


@dataclass(frozen=True)
class TaskConfig:
    name: str = "chain_sum"  # "chain_sum", "number_walk" (procedural) or "file"
    train_file: str | None = None  # name=file: .jsonl or .parquet, one prompt a row
    train_files: list[TrainFile] | None = None  # name=file: several instead, mixed by weight
    heldout_file: str | None = None  # name=file: rows that are never trained on
    prompt_field: str | None = None  # name=file: column with text or chat messages; None: common/tasks/columns.py
    answer_field: str | None = None  # name=file: column with the reference, as it stands; None: as above
    on_bad_row: OnBadRow = OnBadRow.error  # name=file: rows that cannot be used
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)  # name=file: e.g. {enable_thinking: false}
    seed: int = 0  # procedural tasks: seed of the train and held-out sets (not of the run)
    num_train: int = 20000  # procedural tasks: rows in the train set
    num_heldout: int = 256  # procedural tasks: rows in the held-out set, disjoint from the train set


@dataclass(frozen=True)
class VerifierConfig:
    function: str | None = None  # "module:function"; None: the task's own
    num_workers: int = 1  # worker processes per actor
    timeout_s: float = 3.0  # wall-clock limit for one answer
    memory_mb: int = 1024  # address-space limit of one worker
    max_error_share: float = 0.1  # of a step's responses: when the verifier fails on more, the run ends
    # "exact": a formula of the question is no answer to it; "any": its value is enough. Of a function with this keyword
    answer_form: AnswerForm = AnswerForm.EXACT


@dataclass(frozen=True)
class RewardConfig:
    correct: float = 1.0  # VAPO.. DAPO section 2.4: +1 / -1
    wrong: float = -1.0
    unanswered: float = -1.0
    timed_out: float = -1.0
    overlong_penalty: bool = False  # DAPO eq. 13, soft overlong punishment
    overlong_buffer: int = 4096  # tokens before max_tokens over which the penalty grows from 0 to -1


@dataclass(frozen=True)
class RolloutConfig:
    prompts_per_step: int = 16  # P; VAPO: 512
    group_size: int = 8  # n responses per prompt; VAPO: 16
    temperature: float = 1.0  # of sampling and of every log-prob
    max_tokens: int = 128  # response length limit
    stop: list[str] = field(default_factory=list)  # strings that end a response, besides end-of-sequence; also in eval


@dataclass(frozen=True)
class StalenessConfig:
    max_staleness: int = 2  # versions; 0 is synchronous (algorithm.correction then corrects the engine's rounding)
    over_age: OverAge = OverAge.drop
    batching: Batching = Batching.admission_order
    exact: bool = False  # every batch exactly max_staleness versions old: publication waits (experiments)


@dataclass(frozen=True)
class AlgorithmConfig:
    """Defaults are VAPO's (arXiv 2504.05118, section 5.1) unless a comment says otherwise."""

    advantage: AdvantageEstimator = AdvantageEstimator.gae
    gamma: float = 1.0
    length_adaptive_alpha: float | None = 0.05  # policy lambda = 1 - 1/(alpha l), eq. 5; None: policy_lambda
    policy_lambda: float = 0.95  # used when length_adaptive_alpha is None
    segment_probability: float | None = None  # SAE (arXiv 2601.07320: 0.2): a token drawn with less starts a segment of
    # the response; the policy's lambda counts at starts of segments alone and is 1 between them. None: at every token
    critic_lambda: float = 1.0  # decoupled GAE; in critic warm-up always 1
    value_target: ValueTarget = ValueTarget.gae
    vtrace_rho_bar: float = 1.0
    vtrace_c_bar: float = 1.0
    value_gate: bool = False  # advantages of a batch whose outcomes the critic does not explain: reward - mean (EVPO)
    # Share of a batch's tokens, those on which several critics agree best, that get no advantage (AsyPPO: 0.2)
    agreement_mask: float | None = None
    whiten_advantages: bool = False  # over the whole batch, all ranks
    clip_low: float = 0.2  # eq. 8
    clip_high: float = 0.28  # eq. 8, clip-higher
    dual_clip: float | None = None  # lower bound c > 1 for negative advantages; None: off
    aggregation: Aggregation = Aggregation.token
    positive_lm_weight: float = 0.1  # mu of eq. 10
    entropy_weight: float = 0.0
    entropy_filter: float | None = None  # share of tokens, those on which critics agree least, without it (AsyPPO: 0.2)
    kl_weight: float = 0.0  # to the initial policy; a reference model is loaded only when > 0
    correction: Correction = Correction.decoupled  # AReaL (arXiv 2505.24298), weights truncated at truncation
    truncation: float = 2.0  # C of decoupled and tis; of behavior and m2, in the language-model loss
    mask_low: float = 0.5  # icepop: tokens of weight outside [mask_low, mask_high] leave the policy loss
    mask_high: float = 5.0
    dis_low: float = 0.3  # dis (arXiv 2607.07508): keep 1 - dis_low < ratio < 1 + dis_high
    dis_high: float = 5.0
    m2_threshold: float = 0.04  # m2 (arXiv 2510.01161): nats^2, mean squared log-ratio that stays in the policy loss
    ess_scaled_step: bool = False  # the policy's learning rate times sqrt(ESS / n) of a mini-batch (VCPO, 2602.17616)
    critic_warmup_steps: int = (
        50  # steps of value pretraining, with Monte-Carlo targets, before the first policy update
    )
    critic_warmup_epochs: int = 1  # passes over each warm-up batch
    critic_warmup_gate: float | None = None  # explained variance that ends warm-up early; None: all steps
    critic_updates_per_step: int = 1  # passes of the critic over the batch after warm-up
    value_clip: float | None = None
    dynamic_sampling: bool = False  # DAPO: replace groups that are all right or all wrong
    max_uninformative: int = 1000  # so many replaced groups in a row end the run


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 1e-6
    warmup_steps: int = 10  # optimizer steps of linear warm-up
    schedule: Schedule = Schedule.constant  # not in the paper: linear
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class LearnerConfig:
    ranks: int = 1  # processes under torch.distributed
    replicas: int = 1  # HSDP: copies of the sharded model; must divide ranks
    steps: int = 30  # policy steps, after critic warm-up
    mini_batches: int = 4  # optimizer steps per step
    tokens_per_micro_batch: int = 16384  # packed prompt + response tokens of one forward pass on one rank
    share_prefixes: bool = False  # what sequences of a micro-batch have in common at their start is computed once
    logprob_chunk_tokens: int = 1024  # tokens whose logits exist at once
    activation_checkpointing: int = 0  # every n-th layer keeps its input only: 1 all layers, 2 every other; 0 none
    compile: bool = False  # torch.compile of each decoder layer; on CPUs needs a C++ compiler. Not run on a GPU by us
    offload: Offload = Offload.none
    batch_timeout_s: float = 600.0  # longest wait for a batch
    stop_timeout_s: float = 60.0  # from SIGINT or SIGTERM: to finish the step, save and send the actors home
    restarts: int = 3  # times within restart_window_s that `train` restarts a learner that crashed or was killed
    restart_window_s: float = 3600.0
    record: bool = (
        False  # keep what every step consumed in RUN/record, about 12 bytes a token, for `train --replay RUN`
    )
    replay: str | None = None  # a run whose record is trained on, without actors; set by `train --replay RUN`
    policy: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-6))


@dataclass(frozen=True)
class ActorsConfig:
    count: int = 1  # actors that `train` starts here; more may connect from elsewhere at any time
    groups_in_flight: int = 16  # leases that one actor holds at once
    # Responses that its engine samples at once, so that leases beyond them wait for a place and none stays empty until
    # the longest response of a group has ended. None: all responses of groups_in_flight
    max_num_seqs: int | None = None
    placement: Placement = Placement.auto  # device=cuda; `auto` of roles that are started alone is separate
    # Fraction of the device's whole memory (of RAM on CPUs) for the engine, without its CUDA context. None: what the
    # learner leaves of a shared GPU (common/memory.py), 0.9 of one of its own, 0.3 on CPUs
    gpu_memory_utilization: float | None = None
    # placement=shared: the engine gives its memory back while the learner trains, and generation waits; needs
    # staleness.max_staleness=0
    sleep_while_training: bool = False
    cpu_kv_cache_gib: int = 1  # key-value cache of the CPU engine
    enforce_eager: bool = True  # skip compilation: faster start, same speed for small models on CPUs
    tensor_parallel_size: int = 1
    start_timeout_s: float = 300.0  # from process start to Ready
    restarts: int = 3  # times within restart_window_s that `train` restarts an actor that died after it was Ready
    restart_window_s: float = 3600.0
    drain_s: float = 30.0  # from SIGTERM: to finish the groups that it samples; what is left is leased to others


@dataclass(frozen=True)
class WeightsConfig:
    backend: TransferBackend = TransferBackend.auto
    publish_every: int = 1  # policy steps per published version
    kv_cache: KVCache = KVCache.keep
    timeout_s: float = 60.0  # of each phase of a publication, and of each bucket of weights on its way
    probe_tokens: int = 256  # of the text that actor and learner both score after an update; fits model.max_model_len
    # An actor leaves when it differs there by this multiple of what was seen at version 0, or by more than arithmetic
    # explains (publication/probe.py)
    probe_factor: float = 4.0
    drift_factor: float = 10.0  # alarm when the mismatch exceeds this multiple of its floor (publication/sentinel.py)


@dataclass(frozen=True)
class TransportConfig:
    host: str = "127.0.0.1"  # address that the learner binds; 0.0.0.0: every interface
    advertise_host: str | None = None  # address at which actors reach it, for weights too; None: follows from host
    port: int = 0  # 0: any free port
    heartbeat_s: float = 0.5
    heartbeat_timeout_s: float = 30.0  # silence after which a peer counts as lost, and an actor connects anew
    # A lease that has not grown for so long, while its engine was busy, is taken back; an engine that drew nothing for
    # twice as long has to leave. More than the engine ever needs for its first token
    lease_timeout_s: float = 60.0
    # A lease that keeps a batch waiting is leased again to an actor with room when it takes this multiple of the median
    # time and is this many times slower
    straggler_factor: float = 3.0
    # From the loss of an actor until its leases go to others. Then a broken connection costs nothing that was sampled
    grace_s: float = 5.0
    # How long an actor tries to reach a learner that it has lost, and the learner remembers an actor that it has lost
    reconnect_s: float = 600.0
    max_message_mb: int = 64  # larger messages are refused
    curve: bool = True  # encryption, and keys that say who may take part; off: anybody who reaches the port may
    keys: str | None = None  # folder made by `run.py keygen`; None: RUN/keys, made by the learner


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10  # policy steps between held-out evaluations; 0: only before and after
    num_prompts: int = 256  # held-out rows used; at most the held-out set
    samples_per_prompt: int = 4  # k of avg@k; at temperature 0 one, because all are alike
    temperature: float = 1.0  # 0: greedy
    share: float = 0.5  # of each actor's leases and room while training waits too; alone, evaluation has all of it
    top_p: float = 1.0  # sample from the smallest set of tokens with this much probability; 1: all (never in training)
    top_k: int = 0  # sample from the k most probable tokens; 0: all (never in training)


@dataclass(frozen=True)
class SamplesConfig:
    """Responses that are kept as text with what training made of each token, in RUN/samples (learner/samples.py)."""

    groups: int = 2  # of a sampled step, whole ones; 0: none are kept
    every: int = 1  # steps from one that is sampled to the next, warm-up included
    max_mb: int = 256  # of all files together; where there would be more, steps are thinned out evenly


@dataclass(frozen=True)
class AlarmConfig:
    """Limits of health, each for the median of `window` policy steps; null: not judged. What it means to cross one, and
    what to do then, is in common/limits.py and docs/metrics.md."""

    enabled: bool = True
    window: int = 5  # policy steps
    min_ess: float | None = 0.3  # of tokens; verl
    min_sequence_ess_factor: float | None = 0.1  # of responses, times the policy's first `window` steps
    min_weight_mean: float | None = 0.5  # of the correction's weights; verl
    max_weight_mean: float | None = 2.0  # verl
    max_chi2: float | None = 1.0  # of tokens; verl
    max_m2: float | None = 0.2  # nats^2 a token
    max_grad_norm_factor: float | None = 4.0  # times the first `window` steps
    min_entropy_factor: float | None = 0.2  # times the first `window` steps
    min_explained_variance: float | None = -0.5
    max_mismatch_factor: float | None = 10.0  # times the first `window` steps that measure it


@dataclass(frozen=True)
class LoggingConfig:
    """Where a run is seen beside its own files and TensorBoard."""

    console: ConsoleStyle = ConsoleStyle.auto
    trackers: list[TrackerName] = field(default_factory=list)  # what is not installed is refused
    project: str = "async-vapo"  # there; MLflow calls it an experiment


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 0  # steps, warm-up included; 0: only at the end of the critic's warm-up and of the run
    keep: int = 2  # newest complete checkpoints kept
    in_background: bool = True  # write while training goes on


@dataclass(frozen=True)
class Config:
    name: str = "run"  # RUN = runs_dir/name
    runs_dir: str = "runs"
    seed: int = 0
    device: Device = Device.cpu
    cores: list[int] | None = None  # cores to pin to, dealt to learner ranks, then actors; None: all allowed
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    staleness: StalenessConfig = field(default_factory=StalenessConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    actors: ActorsConfig = field(default_factory=ActorsConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    transport: TransportConfig = field(default_factory=TransportConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    alarm: AlarmConfig = field(default_factory=AlarmConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name

    @property
    def is_shared(self) -> bool:
        """Whether learner and actors live on the same GPUs."""
        return self.device is Device.cuda and self.actors.placement is Placement.shared

    @property
    def transfer_backend(self) -> TransferBackend:
        """How weights travel: what device and placement leave as the only choice."""
        if self.device is Device.cpu:
            return TransferBackend.gloo
        return TransferBackend.ipc if self.is_shared else TransferBackend.nccl
