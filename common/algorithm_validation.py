"""Settings of algorithm, reward, adapters and critic that contradict each other, or have no effect as they are."""

from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields
from typing import Any

from common.config import (
    AdvantageEstimator,
    AlgorithmConfig,
    Config,
    ConfigError,
    Correction,
    CriticFrozen,
    CriticNetwork,
    LoraConfig,
    RewardConfig,
    ValueTarget,
)


def check_algorithm(config: Config) -> None:
    """Raises ConfigError for the first such setting."""
    _check_lora(config.lora)
    _check_critic_network(config)
    _check_critics(config)
    _check_critic(config.algorithm)
    _check_unused(config.algorithm, config.reward)


def refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise ConfigError(message)


def _check_critic_network(config: Config) -> None:
    model, advantage = config.model, config.algorithm.advantage
    is_shared = model.critic is CriticNetwork.shared_backbone
    is_frozen = model.critic_frozen is not CriticFrozen.none
    for key, is_set in (
        ("critic_path", model.critic_path is not None),
        ("critic", is_shared),
        ("critic_frozen", is_frozen),
        ("num_critics", model.num_critics > 1),
    ):
        refuse_if(
            is_set and advantage is not AdvantageEstimator.gae,
            f"model.{key}={getattr(model, key)} has no effect: algorithm.advantage={advantage} has no critic",
        )
    refuse_if(
        is_shared and config.lora.rank == 0,
        f"model.critic={model.critic} needs adapters, because training the critic's weights would change the policy: "
        "set lora.rank",
    )
    refuse_if(
        is_frozen and config.lora.rank > 0,
        f"model.critic_frozen={model.critic_frozen} has no effect with lora.rank={config.lora.rank}, which freezes all "
        "weights: leave it out, and choose what adapters are of with lora.target_modules",
    )
    refuse_if(
        is_shared and model.critic_path is not None,
        f"model.critic_path={model.critic_path} has a backbone of its own: leave it out, or set model.critic=separate",
    )


def _check_critics(config: Config) -> None:
    algorithm, several = config.algorithm, config.model.num_critics
    for name in ("agreement_mask", "entropy_filter"):
        value = getattr(algorithm, name)
        refuse_if(
            value is not None and several == 1,
            f"algorithm.{name}={value} measures by how much critics differ: set model.num_critics=2, or leave it out",
        )
    refuse_if(
        algorithm.entropy_filter is not None and algorithm.entropy_weight == 0.0,
        f"algorithm.entropy_filter={algorithm.entropy_filter} has no effect without a positive "
        "algorithm.entropy_weight: set that too, or leave it out",
    )
    refuse_if(
        several > 1 and config.lora.rank > 0,
        f"model.num_critics={several} needs critics that train all of their weights: set lora.rank=0 instead of "
        f"{config.lora.rank}, or num_critics=1",
    )
    refuse_if(
        several > 1 and algorithm.value_clip is not None,
        f"algorithm.value_clip={algorithm.value_clip} holds a critic to its own old values, of which with "
        f"model.num_critics={several} only the mean is kept: leave it out, or set num_critics=1",
    )


def _check_lora(lora: LoraConfig) -> None:
    for name in ("alpha", "target_modules"):
        value, default = getattr(lora, name), _default(LoraConfig, name)
        _refuse_unused(f"lora.{name}", value, default, lora.rank > 0, "a positive lora.rank")
    refuse_if(
        lora.target_modules == [],
        "lora.target_modules=[] leaves nothing to train: name linear layers, or leave it out for all",
    )


def _check_critic(algorithm: AlgorithmConfig) -> None:
    rho_bar, c_bar = algorithm.vtrace_rho_bar, algorithm.vtrace_c_bar
    refuse_if(
        algorithm.value_target is ValueTarget.vtrace and rho_bar < c_bar,
        f"algorithm.vtrace_rho_bar={rho_bar:g} must be at least algorithm.vtrace_c_bar={c_bar:g}",
    )
    if algorithm.advantage is AdvantageEstimator.gae:
        return
    needs_critic = {
        "critic_warmup_steps": algorithm.critic_warmup_steps > 0,
        "value_target": algorithm.value_target is ValueTarget.vtrace,
        "value_clip": algorithm.value_clip is not None,
        "segment_probability": algorithm.segment_probability is not None,
        "value_gate": algorithm.value_gate,
        "critic_warmup_gate": algorithm.critic_warmup_gate is not None,
        "critic_updates_per_step": algorithm.critic_updates_per_step != 1,
    }
    for name, is_set in needs_critic.items():
        refuse_if(
            is_set,
            f"algorithm.{name}={getattr(algorithm, name)} needs a critic, which algorithm.advantage="
            f"{algorithm.advantage} does not have: set advantage=gae or leave {name} out",
        )


def _check_unused(algorithm: AlgorithmConfig, reward: RewardConfig) -> None:
    """A setting that was changed but has no effect is a misunderstanding, so it is refused."""
    correction = algorithm.correction
    effect = {
        "policy_lambda": (algorithm.length_adaptive_alpha is None, "algorithm.length_adaptive_alpha=null"),
        "dual_clip": (correction is not Correction.dis, "another algorithm.correction than dis, which has no clip"),
        "truncation": (
            correction in (Correction.decoupled, Correction.tis)
            or (correction in (Correction.behavior, Correction.m2) and algorithm.positive_lm_weight > 0.0),
            "algorithm.correction=decoupled or tis, or behavior or m2 and a positive algorithm.positive_lm_weight",
        ),
        "mask_low": (correction is Correction.icepop, "algorithm.correction=icepop"),
        "mask_high": (correction is Correction.icepop, "algorithm.correction=icepop"),
        "dis_low": (correction is Correction.dis, "algorithm.correction=dis"),
        "dis_high": (correction is Correction.dis, "algorithm.correction=dis"),
        "m2_threshold": (correction is Correction.m2, "algorithm.correction=m2"),
        "vtrace_rho_bar": (algorithm.value_target is ValueTarget.vtrace, "algorithm.value_target=vtrace"),
        "vtrace_c_bar": (algorithm.value_target is ValueTarget.vtrace, "algorithm.value_target=vtrace"),
        "max_uninformative": (algorithm.dynamic_sampling, "algorithm.dynamic_sampling=true"),
    }
    for name, (is_used, condition) in effect.items():
        _refuse_unused(
            f"algorithm.{name}", getattr(algorithm, name), _default(AlgorithmConfig, name), is_used, condition
        )
    buffer = _default(RewardConfig, "overlong_buffer")
    _refuse_unused(
        "reward.overlong_buffer",
        reward.overlong_buffer,
        buffer,
        reward.overlong_penalty,
        "reward.overlong_penalty=true",
    )


def _refuse_unused(key: str, value: object, default: object, is_used: bool, condition: str) -> None:
    refuse_if(
        not is_used and value != default,
        f"{key}={value} has no effect without {condition}: set that too, or leave it out",
    )


def _default(section: type[Any], name: str) -> object:
    default = next(field.default for field in fields(section) if field.name == name)
    assert default is not NO_DEFAULT
    return default
