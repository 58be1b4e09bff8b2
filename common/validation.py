"""What cannot work is refused when the configuration is loaded, in one sentence with values and the way out.

Types and names are checked by common/loading.py, which calls `validate`, a task's own settings by common/tasks;
nothing here looks at the machine, except at model folders (common/model_folder.py).
"""

import math
import operator

from common.addresses import is_host, is_wildcard
from common.algorithm_validation import check_algorithm, refuse_if
from common.config import (
    AdvantageEstimator,
    Batching,
    Config,
    ConfigError,
    Device,
    Offload,
    Placement,
    TransferBackend,
)
from common.model_folder import check_model_folder
from common.types import BYTES_PER_TOKEN, LARGEST_REWARD
from common.wire import MAX_HEADER_BYTES, MAX_PACKING_BYTES

INF = float("inf")
LARGEST_INTEGER = 2**32 - 1  # of any setting: numpy's and vLLM's seeds end there, counts and lengths earlier
LONGEST_S = 1e6  # of any time-out: twelve days; the kernel's own end after twenty-five
COLDEST = 0.01  # vLLM samples at this temperature when it is asked for less (except for 0, which is greedy)

# key: (lowest, highest, whether the bounds themselves are allowed); None values (switched off) pass
RANGES: dict[str, tuple[float, float, bool]] = {
    "seed": (0, LARGEST_INTEGER, True),
    "model.max_model_len": (2, INF, True),
    "model.num_critics": (1, INF, True),
    "lora.rank": (0, 65536, True),
    "lora.alpha": (0, INF, False),
    "task.seed": (-INF, INF, True),
    "task.num_train": (1, 10_000_000, True),
    "task.num_heldout": (1, INF, True),
    "verifier.num_workers": (1, 4096, True),
    "verifier.timeout_s": (0, LONGEST_S, False),
    "verifier.memory_mb": (64, INF, True),
    "verifier.max_error_share": (0, 1, True),
    "reward.correct": (-LARGEST_REWARD, LARGEST_REWARD, True),
    "reward.wrong": (-LARGEST_REWARD, LARGEST_REWARD, True),
    "reward.unanswered": (-LARGEST_REWARD, LARGEST_REWARD, True),
    "reward.timed_out": (-LARGEST_REWARD, LARGEST_REWARD, True),
    "reward.overlong_buffer": (1, INF, True),
    "rollout.prompts_per_step": (1, INF, True),
    "rollout.group_size": (1, INF, True),
    "rollout.temperature": (-INF, INF, True),
    "rollout.max_tokens": (1, INF, True),
    "staleness.max_staleness": (0, INF, True),
    "algorithm.gamma": (0, 1, True),
    "algorithm.length_adaptive_alpha": (0, INF, False),
    "algorithm.policy_lambda": (0, 1, True),
    "algorithm.segment_probability": (0, 1, True),
    "algorithm.critic_lambda": (0, 1, True),
    "algorithm.vtrace_rho_bar": (0, INF, False),
    "algorithm.vtrace_c_bar": (0, INF, False),
    "algorithm.agreement_mask": (0, 1, False),
    "algorithm.clip_low": (0, 1, False),
    "algorithm.clip_high": (0, INF, False),
    "algorithm.dual_clip": (1, INF, False),
    "algorithm.positive_lm_weight": (0, INF, True),
    "algorithm.entropy_weight": (0, INF, True),
    "algorithm.entropy_filter": (0, 1, False),
    "algorithm.kl_weight": (0, INF, True),
    "algorithm.truncation": (0, INF, False),
    "algorithm.mask_low": (0, 1, True),
    "algorithm.mask_high": (1, INF, True),
    "algorithm.dis_low": (0, 1, False),
    "algorithm.dis_high": (0, INF, False),
    "algorithm.m2_threshold": (0, INF, False),
    "algorithm.critic_warmup_steps": (0, INF, True),
    "algorithm.critic_warmup_epochs": (1, INF, True),
    "algorithm.critic_warmup_gate": (-INF, 1, False),
    "algorithm.critic_updates_per_step": (1, INF, True),
    "algorithm.value_clip": (0, INF, False),
    "algorithm.max_uninformative": (1, INF, True),
    "learner.ranks": (1, 65536, True),
    "learner.replicas": (1, 65536, True),
    "learner.steps": (0, INF, True),
    "learner.mini_batches": (1, INF, True),
    "learner.tokens_per_micro_batch": (1, INF, True),
    "learner.logprob_chunk_tokens": (1, INF, True),
    "learner.activation_checkpointing": (0, INF, True),
    "learner.batch_timeout_s": (0, LONGEST_S, False),
    "learner.stop_timeout_s": (0, LONGEST_S, False),
    "learner.restarts": (0, INF, True),
    "learner.restart_window_s": (0, LONGEST_S, False),
    **{
        f"learner.{role}.{name}": bounds
        for role in ("policy", "critic")
        for name, bounds in {
            "learning_rate": (0, 1, True),
            "warmup_steps": (0, INF, True),
            "weight_decay": (0, INF, True),
            "beta1": (0, 1, True),
            "beta2": (0, 1, True),
            "max_grad_norm": (0, INF, False),
        }.items()
    },
    "actors.count": (0, 65536, True),
    "actors.groups_in_flight": (1, INF, True),
    "actors.max_num_seqs": (1, INF, True),
    "actors.gpu_memory_utilization": (0.001, 1, True),
    "actors.cpu_kv_cache_gib": (1, INF, True),
    "actors.tensor_parallel_size": (1, 4096, True),
    "actors.start_timeout_s": (0, LONGEST_S, False),
    "actors.restarts": (0, INF, True),
    "actors.restart_window_s": (0, LONGEST_S, False),
    "actors.drain_s": (0, LONGEST_S, True),
    "weights.publish_every": (1, INF, True),
    "weights.timeout_s": (0, LONGEST_S, False),
    "weights.probe_tokens": (2, INF, True),
    "weights.drift_factor": (1, INF, True),
    "weights.probe_factor": (1, INF, True),
    "transport.port": (0, 65535, True),
    "transport.heartbeat_s": (0, LONGEST_S, False),
    "transport.heartbeat_timeout_s": (0, LONGEST_S, False),
    "transport.grace_s": (0, LONGEST_S, True),
    "transport.reconnect_s": (0, LONGEST_S, True),
    "transport.lease_timeout_s": (0, LONGEST_S, False),
    "transport.straggler_factor": (1, INF, True),
    "transport.max_message_mb": (1, INF, True),
    "eval.every": (0, INF, True),
    "eval.num_prompts": (1, INF, True),
    "eval.samples_per_prompt": (1, INF, True),
    "eval.temperature": (0, INF, True),
    "eval.share": (0.01, 1, True),
    "eval.top_p": (0, 1, True),
    "eval.top_k": (0, INF, True),
    "samples.groups": (0, INF, True),
    "samples.every": (1, INF, True),
    "samples.max_mb": (1, INF, True),
    "alarm.window": (1, 10_000, True),
    "alarm.min_ess": (0, 1, True),
    "alarm.min_sequence_ess_factor": (0, 1, True),
    "alarm.min_weight_mean": (0, INF, True),
    "alarm.max_weight_mean": (0, INF, False),
    "alarm.max_chi2": (0, INF, False),
    "alarm.max_m2": (0, INF, False),
    "alarm.max_grad_norm_factor": (1, INF, False),
    "alarm.min_entropy_factor": (0, 1, True),
    "alarm.min_explained_variance": (-INF, 1, True),
    "alarm.max_mismatch_factor": (1, INF, False),
    "checkpoint.every": (0, INF, True),
    "checkpoint.keep": (1, INF, True),
}


def validate(config: Config) -> None:
    """Raises ConfigError for the first setting that cannot work, alone or together with another."""
    _check_name(config)
    for key, bounds in RANGES.items():
        _check_range(key, operator.attrgetter(key)(config), *bounds)
    _check_temperatures(config)
    _check_models(config)
    _check_optimizers(config)
    _check_device(config)
    _check_placement(config)
    _check_staleness(config)
    _check_sizes(config)
    _check_sampling(config)
    _check_rewards(config)
    _check_replay(config)
    check_algorithm(config)


def _check_range(key: str, value: float | None, low: float, high: float, closed: bool) -> None:
    if value is None:
        return
    refuse_if(isinstance(value, float) and not math.isfinite(value), f"{key}={value} must be a finite number")
    refuse_if(
        isinstance(value, int) and abs(value) > LARGEST_INTEGER,
        f"{key}={value} must be at most {LARGEST_INTEGER} in magnitude",
    )
    if low <= value <= high if closed else low < value < high:
        return
    words = ("at least", "at most") if closed else ("above", "below")
    limits = [f"{words[0]} {low:g}"] if low > -INF else []
    limits += [f"{words[1]} {high:g}"] if high < INF else []
    raise ConfigError(f"{key}={value} must be {' and '.join(limits)}")


def _check_name(config: Config) -> None:
    refuse_if(
        config.name in ("", ".", "..") or "/" in config.name,
        f"name={config.name!r} must be a plain folder name; runs_dir says where the folder goes",
    )
    cores = config.cores
    refuse_if(
        cores is not None and (not cores or len(set(cores)) < len(cores) or min(cores) < 0),
        f"cores={cores} must be a list of different core numbers, or null for all that this process may use",
    )
    function = config.verifier.function
    refuse_if(
        function is not None and function.count(":") != 1,
        f"verifier.function={function} must be written module:function",
    )


def _check_models(config: Config) -> None:
    for key, value in (("model.path", config.model.path), ("model.critic_path", config.model.critic_path)):
        if value is not None:
            check_model_folder(key, value, config.model.max_model_len)


def _check_replay(config: Config) -> None:
    replay, count = config.learner.replay, config.actors.count
    refuse_if(
        replay is not None and count > 0,
        f"learner.replay={replay} trains on a record, for which actors.count={count} actors have nothing to do: set "
        "actors.count=0",
    )
    refuse_if(
        replay is not None and config.learner.record,
        f"learner.record=true would only copy the record of learner.replay={replay}: leave it out",
    )


def _check_temperatures(config: Config) -> None:
    rollout, evaluation = config.rollout.temperature, config.eval.temperature
    reason = f"vLLM samples at {COLDEST} when it is asked for less"
    refuse_if(
        rollout < COLDEST,
        f"rollout.temperature={rollout:g} must be at least {COLDEST}: {reason}, and the learner computes at what is "
        "configured",
    )
    refuse_if(
        0 < evaluation < COLDEST,
        f"eval.temperature={evaluation:g} must be 0, which is greedy, or at least {COLDEST}: {reason}",
    )


def _check_optimizers(config: Config) -> None:
    for role, optimizer in (("policy", config.learner.policy), ("critic", config.learner.critic)):
        for name in ("beta1", "beta2"):
            refuse_if(
                getattr(optimizer, name) == 1,
                f"learner.{role}.{name}=1 would never forget its first gradient: it must be below 1",
            )


def _check_device(config: Config) -> None:
    backend, wanted = config.weights.backend, config.transfer_backend
    place = "" if config.device is Device.cpu else f" and actors.placement={config.actors.placement}"
    refuse_if(
        backend not in (TransferBackend.auto, wanted),
        f"weights.backend={backend} does not work with device={config.device}{place}: use {wanted}, or leave it out",
    )
    ranks, replicas = config.learner.ranks, config.learner.replicas
    refuse_if(
        ranks % replicas != 0,
        f"learner.replicas={replicas} must divide learner.ranks={ranks}",
    )
    host, advertised = config.transport.host, config.transport.advertise_host
    refuse_if(
        not is_host(host),
        f"transport.host={host!r} is neither an address nor a name: give one of this machine, without a port",
    )
    refuse_if(
        advertised is not None and is_wildcard(advertised),
        f"transport.advertise_host={advertised} is no address that an actor could connect to: name one of this "
        "machine, or leave it to transport.host",
    )
    refuse_if(
        config.learner.offload is not Offload.none and config.device is Device.cpu,
        f"learner.offload={config.learner.offload} has no effect with device=cpu, where everything is in host memory: "
        "leave it out",
    )
    _check_transport(config)


def _largest_group(config: Config) -> tuple[int, str]:
    """Responses to one prompt, at most, and the setting that says so."""
    group, samples = config.rollout.group_size, config.eval.samples_per_prompt if config.eval.temperature > 0 else 1
    return max((group, f"rollout.group_size={group}"), (samples, f"eval.samples_per_prompt={samples}"))


def largest_message_bytes(config: Config) -> int:
    """Of what a run sends: a lease that goes on with responses of which nearly all has been sampled. Its row may fill
    the header. A group has neither row nor prompt."""
    per_response = config.rollout.max_tokens * BYTES_PER_TOKEN + 4
    prompt = 4 * config.model.max_model_len
    return MAX_HEADER_BYTES + prompt + _largest_group(config)[0] * per_response + MAX_PACKING_BYTES


def _check_transport(config: Config) -> None:
    transport, rollout = config.transport, config.rollout
    beat, silence = transport.heartbeat_s, transport.heartbeat_timeout_s
    refuse_if(
        silence < 2 * beat,
        f"transport.heartbeat_timeout_s={silence:g} must be at least twice transport.heartbeat_s={beat:g}",
    )
    refuse_if(
        transport.keys is not None and not transport.curve,
        f"transport.keys={transport.keys} has no effect with transport.curve=off: leave out one of them",
    )
    largest_mb = 1 + (largest_message_bytes(config) >> 20)
    refuse_if(
        transport.max_message_mb < largest_mb,
        f"transport.max_message_mb={transport.max_message_mb} does not hold a lease that goes on with "
        f"{_largest_group(config)[1]} responses of rollout.max_tokens={rollout.max_tokens}: set it to {largest_mb} or "
        "more",
    )
    grace, reconnect = config.transport.grace_s, config.transport.reconnect_s
    refuse_if(
        grace >= silence,
        f"transport.grace_s={grace:g} must be below transport.heartbeat_timeout_s={silence:g}, for which a new actor "
        "waits while the learner asks whether an earlier one of its name is still there",
    )
    refuse_if(
        reconnect < grace,
        f"transport.reconnect_s={reconnect:g} must be at least transport.grace_s={grace:g}, for which a lost actor's "
        "leases are kept",
    )
    patience = config.transport.lease_timeout_s
    refuse_if(
        patience < 2 * beat,
        f"transport.lease_timeout_s={patience:g} must be at least twice transport.heartbeat_s={beat:g}, after which "
        "leases report how far they are",
    )


def _check_placement(config: Config) -> None:
    actors, bound, is_cpu = config.actors, config.staleness.max_staleness, config.device is Device.cpu
    refuse_if(
        is_cpu and actors.placement is not Placement.auto,
        f"actors.placement={actors.placement} has no effect with device=cpu: leave it out",
    )
    width, ranks = actors.tensor_parallel_size, config.learner.ranks
    refuse_if(
        config.is_shared and (ranks > 1 or width > 1),
        f"actors.placement=shared is for one GPU, that of a single learner rank with actors beside it: with "
        f"learner.ranks={ranks} and actors.tensor_parallel_size={width} set actors.placement=separate",
    )
    if not actors.sleep_while_training:
        return
    sleep = "actors.sleep_while_training=true"
    refuse_if(is_cpu, f"{sleep} needs device=cuda, because vLLM's sleep mode frees the memory of GPUs only")
    refuse_if(
        actors.placement is Placement.separate,
        f"{sleep} has no effect with actors.placement=separate, because training does not need the actors' GPUs: "
        "leave it out",
    )
    refuse_if(
        bound > 0,
        f"{sleep} is synchronous, nothing is sampled during training: it needs staleness.max_staleness=0, not {bound}",
    )


def _check_staleness(config: Config) -> None:
    bound, every = config.staleness.max_staleness, config.weights.publish_every
    refuse_if(
        bound == 0 and every != 1,
        f"weights.publish_every={every} cannot be on-policy: staleness.max_staleness=0 needs publish_every=1",
    )
    refuse_if(
        config.learner.steps % every != 0,
        f"weights.publish_every={every} must divide learner.steps={config.learner.steps}: the last steps would never "
        "be published, nor evaluated",
    )
    refuse_if(
        config.staleness.exact and bound == 0,
        "staleness.exact=true has nothing to hold back at staleness.max_staleness=0: raise the bound",
    )
    refuse_if(
        config.staleness.exact and config.staleness.batching is not Batching.admission_order,
        f"staleness.exact=true needs staleness.batching=admission_order, not {config.staleness.batching}: only in that "
        "order are all groups of a batch equally old",
    )


def _check_sizes(config: Config) -> None:
    rollout, learner, length = config.rollout, config.learner, config.model.max_model_len
    responses = rollout.prompts_per_step * rollout.group_size
    refuse_if(
        responses < learner.mini_batches,
        f"learner.mini_batches={learner.mini_batches} is more than the {responses} responses of a step "
        f"(rollout.prompts_per_step={rollout.prompts_per_step} x rollout.group_size={rollout.group_size})",
    )
    refuse_if(
        learner.share_prefixes and rollout.prompts_per_step < learner.mini_batches,
        f"learner.mini_batches={learner.mini_batches} is more than the rollout.prompts_per_step="
        f"{rollout.prompts_per_step} groups of a step: with learner.share_prefixes=true each stays whole",
    )
    refuse_if(
        length <= rollout.max_tokens,
        f"model.max_model_len={length} leaves no room for a prompt: it must exceed "
        f"rollout.max_tokens={rollout.max_tokens}",
    )
    refuse_if(
        learner.tokens_per_micro_batch < length,
        f"learner.tokens_per_micro_batch={learner.tokens_per_micro_batch} cannot hold one sequence of "
        f"model.max_model_len={length} tokens",
    )
    refuse_if(
        config.task.name != "file" and config.eval.num_prompts > config.task.num_heldout,
        f"eval.num_prompts={config.eval.num_prompts} is more than task.num_heldout={config.task.num_heldout}",
    )
    estimator = config.algorithm.advantage
    compares = estimator is not AdvantageEstimator.gae or config.algorithm.dynamic_sampling
    reason = (
        "algorithm.dynamic_sampling=true" if estimator is AdvantageEstimator.gae else f"algorithm.advantage={estimator}"
    )
    refuse_if(
        compares and rollout.group_size < 2,
        f"rollout.group_size={rollout.group_size} is too small: {reason} compares the responses of a "
        "group, so it needs at least 2",
    )


def _check_sampling(config: Config) -> None:
    stop, top_p, top_k = config.rollout.stop, config.eval.top_p, config.eval.top_k
    refuse_if("" in stop, f"rollout.stop={stop} holds an empty string, which would end every response at once")
    refuse_if(top_p == 0, "eval.top_p=0 leaves no token to sample: use eval.temperature=0 for the most probable one")
    cut = f"eval.top_p={top_p:g}" if top_p < 1 else f"eval.top_k={top_k}"
    refuse_if(
        config.eval.temperature == 0 and (top_p < 1 or top_k > 0),
        f"{cut} has no effect with eval.temperature=0, which takes the most probable token",
    )


def _check_rewards(config: Config) -> None:
    reward = config.reward
    refuse_if(
        not reward.correct > max(reward.wrong, reward.unanswered, reward.timed_out),
        f"reward.correct={reward.correct:g} must be above reward.wrong={reward.wrong:g}, "
        f"reward.unanswered={reward.unanswered:g} and reward.timed_out={reward.timed_out:g}",
    )
    refuse_if(
        reward.overlong_penalty and reward.overlong_buffer >= config.rollout.max_tokens,
        f"reward.overlong_buffer={reward.overlong_buffer} must be smaller than "
        f"rollout.max_tokens={config.rollout.max_tokens}",
    )
