"""Loading, merging and refusing configurations; every shipped recipe loads."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.config import Aggregation, Config, ConfigError, OnBadRow, TrainFile, TransferBackend
from common.loading import RECIPES, load_config, read_config, save_config
from common.types import FinishReason, Lease, Purpose
from common.validation import largest_message_bytes
from common.wire import MAX_HEADER_BYTES, MAX_PACKING_BYTES, encode, pack

MODEL = "model.path=configs/models/chain_sum"
NAMES = sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml"))
WITH_OWN_MODEL = ("demo", "number_walk")  # the others need one that is not shipped, or go on top of a task
FOR_GPUS = [name for name in NAMES if "qwen" in name or name == "one_gpu"]  # with a task and a model of their own
FOR_EVAL = ["eval_aime24"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)


def refusal(overrides: Sequence[str], files: Sequence[str] = ()) -> str:
    """The message with which `overrides` are refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(files, [MODEL, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def long_model(tmp_path: Path) -> str:
    """The setting of a model folder with as many positions as the paper's models have."""
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 131072}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # no tensors
    (tmp_path / "tokenizer.json").write_text("{}")
    return f"model.path={tmp_path}"


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_loads(name: str, long_model: str) -> None:
    if name in WITH_OWN_MODEL:
        load_config([name], [])
    else:
        load_config([name], [long_model])


@pytest.mark.parametrize("task", WITH_OWN_MODEL)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in (*WITH_OWN_MODEL, *FOR_GPUS, *FOR_EVAL)])
def test_every_algorithm_and_ablation_goes_on_top_of_a_task(task: str, name: str) -> None:
    before, after = load_config([task], []), load_config([task, name], [])
    assert after.name == task and after.model.path == before.model.path
    assert after.rollout.prompts_per_step * after.rollout.group_size == 128
    assert after.actors.groups_in_flight * after.rollout.group_size == 128


# What each recipe changes on top of number_walk and VAPO, by full key: all of it, and nothing else.
CHANGES = {
    "vapo": set(),
    "ppo": {
        "algorithm.length_adaptive_alpha",
        "algorithm.critic_lambda",
        "algorithm.clip_high",
        "algorithm.aggregation",
        "algorithm.positive_lm_weight",
        "algorithm.critic_warmup_steps",
        "rollout.prompts_per_step",
        "rollout.group_size",
        "actors.groups_in_flight",
    },
    "grpo": {
        "algorithm.advantage",
        "algorithm.length_adaptive_alpha",
        "algorithm.clip_high",
        "algorithm.aggregation",
        "algorithm.positive_lm_weight",
        "algorithm.critic_warmup_steps",
        "algorithm.whiten_advantages",
    },
    "dapo": {
        "algorithm.advantage",
        "algorithm.length_adaptive_alpha",
        "algorithm.positive_lm_weight",
        "algorithm.critic_warmup_steps",
        "algorithm.whiten_advantages",
        "algorithm.dynamic_sampling",
    },
    "lora": {"lora.rank", "learner.policy.learning_rate", "learner.critic.learning_rate"},
    "mini_critics": {"model.num_critics", "algorithm.agreement_mask"},
    "sao_critic": {"model.critic_frozen", "algorithm.critic_updates_per_step"},
    "ablations/no_value_pretraining": {"algorithm.critic_warmup_steps"},
    "ablations/no_decoupled_gae": {"algorithm.critic_lambda"},
    "ablations/no_length_adaptive_gae": {"algorithm.length_adaptive_alpha"},
    "ablations/no_clip_higher": {"algorithm.clip_high"},
    "ablations/no_token_level_loss": {"algorithm.aggregation"},
    "ablations/no_positive_lm_loss": {"algorithm.positive_lm_weight"},
    "ablations/no_group_sampling": {"rollout.prompts_per_step", "rollout.group_size", "actors.groups_in_flight"},
}
OF_THE_PAPER = [name for name in FOR_GPUS if name != "one_gpu"]


def settings(config: Config) -> dict[str, object]:
    """Every setting by its full key."""
    found: dict[str, object] = {}
    sections: list[tuple[str, Any]] = [("", config)]
    while sections:
        prefix, section = sections.pop()
        for name, value in ((f.name, getattr(section, f.name)) for f in dataclasses.fields(section)):
            if dataclasses.is_dataclass(value):
                sections.append((f"{prefix}{name}.", value))
            else:
                found[prefix + name] = value
    return found


def test_every_recipe_has_its_list_of_changes() -> None:
    assert sorted([*CHANGES, *WITH_OWN_MODEL, *FOR_GPUS, *FOR_EVAL]) == NAMES


def test_the_papers_evaluation_has_the_papers_numbers(long_model: str) -> None:
    config = load_config(["eval_aime24"], [long_model])
    assert (config.eval.samples_per_prompt, config.eval.temperature, config.eval.top_p) == (32, 1.0, 0.7)
    assert config.verifier.function == "actors.verifier.math:verify"


@pytest.mark.parametrize("name", CHANGES)
def test_a_recipe_changes_what_it_is_named_for_and_nothing_else(name: str) -> None:
    base = settings(load_config(["number_walk", "vapo"], []))
    changed = settings(load_config(["number_walk", "vapo", name], []))
    assert {key for key, value in changed.items() if value != base[key]} == CHANGES[name]


def test_all_ablations_together_are_ppo() -> None:
    ablations = [name for name in NAMES if name.startswith("ablations/")]
    assert len(ablations) == 7
    assert load_config(["number_walk", *ablations], []) == load_config(["number_walk", "ppo"], [])


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_papers_recipes_run_vapo_with_the_papers_numbers(name: str, long_model: str) -> None:
    config = load_config([name], [long_model])
    assert config.algorithm == load_config(["vapo"], [MODEL]).algorithm
    assert (config.rollout.prompts_per_step, config.rollout.group_size) == (512, 16)
    assert (config.learner.policy.learning_rate, config.learner.critic.learning_rate) == (1e-6, 2e-6)
    assert (config.learner.mini_batches, config.algorithm.critic_warmup_steps) == (16, 50)


def test_vapo_is_the_default_algorithm() -> None:
    assert load_config(["vapo"], [MODEL]).algorithm == load_config([], [MODEL]).algorithm


def test_later_files_and_then_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nlearner: {steps: 5, mini_batches: 2}\n")
    (tmp_path / "b.yaml").write_text("learner: {steps: 6}\n")
    config = load_config([str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")], [MODEL, "seed=3"])
    assert (config.seed, config.learner.steps, config.learner.mini_batches) == (3, 6, 2)


def test_overrides_are_typed() -> None:
    config = load_config(
        [],
        [MODEL, "learner.policy.learning_rate=1e-3", "algorithm.aggregation=sequence", "cores=[1,0]", "name=7"],
    )
    assert config.learner.policy.learning_rate == 1e-3
    assert config.algorithm.aggregation is Aggregation.sequence
    assert config.cores == [1, 0]
    assert config.name == "7"


def test_lists_and_mappings_are_typed_too() -> None:
    config = load_config(
        [],
        [
            MODEL,
            "task.train_files=[{path: a.jsonl, weight: 3}, {path: b.parquet}]",
            "task.chat_template_kwargs={enable_thinking: false}",
            "task.chat_template_kwargs.level=2",
            "task.on_bad_row=drop",
            "rollout.stop=['</answer>', \"\\n\\n\"]",
        ],
    )
    assert config.task.train_files == [TrainFile(path="a.jsonl", weight=3.0), TrainFile(path="b.parquet")]
    assert config.task.chat_template_kwargs == {"enable_thinking": False, "level": 2}
    assert config.task.on_bad_row is OnBadRow.drop
    assert config.rollout.stop == ["</answer>", "\n\n"]


def test_a_saved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_config(
        ["demo"],
        ["cores=[0]", "algorithm.dual_clip=3.0", "task.train_files=[{path: a.jsonl}]", "task.chat_template_kwargs.x=1"],
    )
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert load_config([str(tmp_path / "config.yaml")], []) == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_reading_does_not_ask_for_the_model(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {path: gone}\n")
    assert read_config(tmp_path / "config.yaml").model.path == "gone"


def test_shipped_models_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(load_config(["demo"], []).model.path)
    assert path.is_absolute() and path.is_dir()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.gama=1", ("algorithm.gama", "did you mean algorithm.gamma?")),
        ("learner.max_staleness=3", ("learner.max_staleness", "did you mean staleness.max_staleness?")),
        ("steps=3", ("did you mean learner.steps?",)),
        ("learner.policy.learnin_rate=1", ("did you mean learner.policy.learning_rate?",)),
        ("learner.steps=many", ("learner.steps=many", "Integer")),
        ("learner.steps=1.5", ("learner.steps=1.5",)),
        ("algorithm.advantage=gea", ("algorithm.advantage=gea", "gae, grpo, rloo")),
        ("learner=3", ("learner=3",)),
        ("rollout.top_p=0.9", ("rollout.top_p", "from the whole distribution", "eval.top_p")),
        ("lora.dropout=0.1", ("lora.dropout", "samples without dropout")),
        ("rollout.min_p=0.1", ("rollout.min_p", "importance weights are wrong")),
        ("task.train_files=[{path: a.jsonl, wait: 2}]", ("unknown setting wait",)),
        ("task.on_bad_row=skip", ("task.on_bad_row=skip", "error, drop")),
        ("eval=null", ("eval=",)),
        ("cores=[a]", ("cores[0]=a",)),
        ("learner.steps", ("'learner.steps'", "section.key=value")),
        ("learner.steps=[1", ("learner.steps=[1",)),
        ("name=${oc.env:NO_SUCH_VARIABLE}", ("name", "NO_SUCH_VARIABLE")),
    ],
)
def test_a_mistake_is_explained_in_one_sentence(override: str, words: tuple[str, ...]) -> None:
    message = refusal([override])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["name=a/b"], ("name='a/b'",)),
        (["cores=[1,1]"], ("cores=[1, 1]",)),
        (["weights.publish_every=2", "staleness.max_staleness=0"], ("publish_every=2", "max_staleness=0")),
        (["weights.publish_every=4", "learner.steps=30"], ("publish_every=4", "learner.steps=30", "never")),
        (["staleness.exact=true", "staleness.max_staleness=0"], ("staleness.exact",)),
        (["staleness.exact=true", "staleness.batching=first_finished"], ("staleness.exact=true", "admission_order")),
        (["weights.backend=nccl"], ("weights.backend=nccl", "device=cpu", "use gloo")),
        (["device=cuda", "weights.backend=gloo"], ("weights.backend=gloo", "device=cuda", "use nccl")),
        (["learner.offload=optimizer"], ("learner.offload=optimizer has no effect with device=cpu",)),
        (["learner.offload=all"], ("learner.offload=all has no effect with device=cpu",)),
        (["learner.activation_checkpointing=true"], ("learner.activation_checkpointing=True",)),
        (["learner.ranks=4", "learner.replicas=3"], ("learner.replicas=3", "learner.ranks=4")),
        (["algorithm.dual_clip=1.0"], ("algorithm.dual_clip=1.0", "above 1")),
        (["algorithm.gamma=1.1"], ("algorithm.gamma=1.1", "at most 1")),
        (["learner.batch_timeout_s=nan"], ("learner.batch_timeout_s=nan",)),
        (["rollout.group_size=1", "algorithm.dynamic_sampling=true"], ("rollout.group_size=1", "dynamic_sampling")),
        (["rollout.group_size=1", "algorithm.advantage=rloo"], ("rollout.group_size=1", "advantage=rloo")),
        (["rollout.prompts_per_step=1", "rollout.group_size=2"], ("learner.mini_batches=4", "2 responses")),
        (["learner.share_prefixes=true", "rollout.prompts_per_step=3"], ("mini_batches=4", "prompts_per_step=3")),
        (["rollout.max_tokens=256"], ("model.max_model_len=256", "rollout.max_tokens=256")),
        (["learner.tokens_per_micro_batch=100"], ("tokens_per_micro_batch=100", "256")),
        (["algorithm.advantage=grpo"], ("critic_warmup_steps=50", "advantage=grpo")),
        (
            ["algorithm.advantage=grpo", "algorithm.critic_warmup_steps=0", "algorithm.value_target=vtrace"],
            ("value_target=vtrace", "needs a critic"),
        ),
        (
            ["algorithm.advantage=rloo", "algorithm.critic_warmup_steps=0", "algorithm.value_gate=true"],
            ("value_gate=True", "needs a critic"),
        ),
        (
            ["algorithm.advantage=rloo", "algorithm.critic_warmup_steps=0", "algorithm.segment_probability=0.2"],
            ("segment_probability=0.2", "needs a critic"),
        ),
        (["model.path=nowhere"], ("model.path=nowhere", "run.py prepare")),
        (["model.critic_path=nowhere"], ("model.critic_path=nowhere",)),
        (["lora.rank=-1"], ("lora.rank=-1", "at least 0")),
        (["lora.rank=8", "lora.alpha=0"], ("lora.alpha=0", "above 0")),
        (["lora.alpha=16"], ("lora.alpha=16", "without a positive lora.rank")),
        (
            ["lora.target_modules=[q_proj]"],
            ("lora.target_modules=['q_proj']", "no effect without a positive lora.rank"),
        ),
        (["lora.rank=8", "lora.target_modules=[]"], ("lora.target_modules=[]", "nothing to train")),
        (["model.critic=shared_backbone"], ("model.critic=shared_backbone", "set lora.rank")),
        (
            ["model.critic=shared_backbone", "lora.rank=8", "model.critic_path=configs/models/chain_sum"],
            ("chain_sum has a backbone of its own", "model.critic=separate"),
        ),
        (
            ["model.critic=shared_backbone", "lora.rank=8", "algorithm.advantage=grpo"],
            ("model.critic=shared_backbone has no effect", "advantage=grpo has no critic"),
        ),
        (["model.critic_frozen=all"], ("critic_frozen=all",)),
        (
            ["model.critic_frozen=attention", "algorithm.advantage=grpo", "algorithm.critic_warmup_steps=0"],
            ("model.critic_frozen=attention has no effect", "advantage=grpo has no critic"),
        ),
        (
            ["model.critic_frozen=attention", "lora.rank=8"],
            ("model.critic_frozen=attention", "lora.rank=8, which freezes all", "lora.target_modules"),
        ),
        (["model.num_critics=0"], ("model.num_critics=0", "at least 1")),
        (["algorithm.agreement_mask=0.2"], ("algorithm.agreement_mask=0.2", "set model.num_critics=2")),
        (["model.num_critics=2", "algorithm.agreement_mask=1"], ("agreement_mask=1", "below 1")),
        (
            ["model.num_critics=2", "algorithm.entropy_filter=0.2"],
            ("entropy_filter=0.2 has no effect", "positive algorithm.entropy_weight"),
        ),
        (["model.num_critics=2", "lora.rank=8"], ("model.num_critics=2", "lora.rank=0 instead of 8")),
        (["model.num_critics=2", "algorithm.value_clip=0.2"], ("algorithm.value_clip=0.2", "model.num_critics=2")),
        (
            ["model.num_critics=2", "algorithm.advantage=grpo", "algorithm.critic_warmup_steps=0"],
            ("model.num_critics=2 has no effect", "advantage=grpo has no critic"),
        ),
        (["rollout.stop=['a', '']"], ("rollout.stop=['a', '']", "empty string")),
        (["eval.top_p=0"], ("eval.top_p=0", "temperature=0")),
        (["eval.top_p=1.5"], ("eval.top_p=1.5", "at most 1")),
        (["eval.top_k=-1"], ("eval.top_k=-1", "at least 0")),
        (["eval.top_k=5", "eval.temperature=0"], ("eval.top_k=5", "eval.temperature=0")),
        (["eval.num_prompts=300"], ("eval.num_prompts=300", "task.num_heldout=256")),
        (["reward.correct=-1"], ("reward.correct=-1",)),
        (["reward.overlong_penalty=true"], ("overlong_buffer=4096", "max_tokens=128")),
        (["reward.overlong_buffer=10"], ("reward.overlong_buffer=10", "overlong_penalty=true")),
        (["algorithm.policy_lambda=0.9"], ("policy_lambda=0.9", "length_adaptive_alpha=null")),
        (["algorithm.truncation=3", "algorithm.correction=none"], ("truncation=3", "no effect")),
        (
            ["algorithm.truncation=3", "algorithm.correction=behavior", "algorithm.positive_lm_weight=0"],
            ("truncation=3", "positive_lm_weight"),
        ),
        (["algorithm.dual_clip=3", "algorithm.correction=dis"], ("dual_clip=3", "no effect")),
        (["algorithm.mask_low=0.1"], ("mask_low=0.1", "icepop")),
        (["algorithm.segment_probability=1.1"], ("segment_probability=1.1", "at most 1")),
        (["algorithm.m2_threshold=0.1"], ("m2_threshold=0.1", "correction=m2")),
        (["algorithm.m2_threshold=0", "algorithm.correction=m2"], ("m2_threshold=0",)),
        (["algorithm.vtrace_c_bar=2"], ("vtrace_c_bar=2", "vtrace")),
        (
            ["algorithm.value_target=vtrace", "algorithm.vtrace_c_bar=2"],
            ("vtrace_rho_bar=1 must be at least", "vtrace_c_bar=2"),
        ),
        (["transport.heartbeat_timeout_s=0.1"], ("heartbeat_timeout_s=0.1",)),
        (["transport.grace_s=30"], ("transport.grace_s=30", "heartbeat_timeout_s=30")),
        (["transport.reconnect_s=4"], ("transport.reconnect_s=4", "transport.grace_s=5")),
        (["reward.correct=1e7"], ("reward.correct=10000000.0", "at most 1e+06")),
        (["transport.lease_timeout_s=0.9"], ("lease_timeout_s=0.9", "heartbeat_s=0.5")),
        (["transport.advertise_host=0.0.0.0"], ("advertise_host=0.0.0.0 is no address that an actor",)),
        (["transport.advertise_host='::'"], ("advertise_host=:: is no address that an actor",)),
        (["transport.keys=k", "transport.curve=off"], ("transport.keys=k", "no effect with transport.curve=off")),
        (["transport.curve=auto"], ("transport.curve=auto",)),
        (
            ["transport.max_message_mb=1", "rollout.group_size=4096"],
            (
                "transport.max_message_mb=1 does not hold a lease that goes on with rollout.group_size=4096",
                "set it to 11 or more",
            ),
        ),
        (
            ["transport.max_message_mb=4", "eval.samples_per_prompt=9"],
            ("does not hold a lease that goes on with eval.samples_per_prompt=9 responses", "set it to 5 or more"),
        ),
        (["verifier.function=module.function"], ("verifier.function=module.function", "module:function")),
        (["transport.port=70000"], ("transport.port=70000", "65535")),
        (["model.max_model_len=1024"], ("model.max_model_len=1024 is more than the 256 positions",)),
        (["learner.critic.beta2=1"], ("learner.critic.beta2=1",)),
        (["algorithm.max_uninformative=9"], ("max_uninformative=9", "dynamic_sampling=true")),
    ],
)
def test_what_cannot_work_together_is_refused_with_the_values(overrides: list[str], words: tuple[str, ...]) -> None:
    message = refusal(overrides)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "overrides",
    [
        ["staleness.max_staleness=0"],
        ["algorithm.length_adaptive_alpha=null", "algorithm.policy_lambda=0.9"],
        ["algorithm.correction=icepop", "algorithm.mask_low=0.1"],
        ["algorithm.correction=behavior", "algorithm.truncation=3"],
        ["device=cuda", "weights.backend=nccl", "model.dtype=bfloat16"],
        ["learner.policy.learning_rate=0"],
        ["learner.steps=0"],
        ["transport.max_message_mb=5"],
        ["transport.max_message_mb=5", "eval.samples_per_prompt=4096", "eval.temperature=0"],
    ],
)
def test_unusual_but_possible_combinations_are_accepted(overrides: list[str]) -> None:
    config = load_config([], [MODEL, *overrides])
    assert config.weights.backend in TransferBackend


def test_the_largest_message_is_a_lease_with_all_that_it_may_hold() -> None:
    """Its row fills the header, and nearly every token of its responses has been sampled."""
    config = load_config([], [MODEL, "eval.samples_per_prompt=50", "rollout.max_tokens=200"])
    n, num_tokens = 50, 50 * 200
    lease = Lease(
        lease_id=1,
        purpose=Purpose.EVAL,
        prompt_uid="p",
        prompt_token_ids=np.zeros(config.model.max_model_len, np.int32),
        reference="",
        row={"tests": ""},
        num_samples=n,
        seed=1,
        temperature=1.0,
        max_tokens=200,
        prefix_lengths=np.full(n, 200, np.int32),
        prefix_token_ids=np.zeros(num_tokens, np.int32),
        prefix_behavior_logprobs=np.zeros(num_tokens, np.float32),
        prefix_versions=np.zeros(num_tokens, np.int32),
        prefix_finish_reasons=(FinishReason.LENGTH,) * n,
    )
    row = {"tests": "x" * (MAX_HEADER_BYTES - len(encode(lease)[0]) - 8)}
    size = len(pack(encode(dataclasses.replace(lease, row=row))))
    assert 0 <= largest_message_bytes(config) - size <= MAX_PACKING_BYTES + 8


def test_a_missing_model_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        load_config([], [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("learner: [1, 2\n", "not readable YAML"),
        ("- 1\n", "mapping"),
        ("seed: 1\nseed: 2\n", "not readable YAML"),
        ("leaner: {steps: 1}\n", "did you mean learner"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    message = refusal([], [str(path)])
    assert str(path) in message and words in message


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    message = refusal([], ["dmo"])
    assert "dmo" in message and "demo" in message and "ablations/no_clip_higher" in message


def test_a_shipped_critic_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = "configs/models/chain_sum"
    config = load_config(["demo"], [f"model.critic_path={shipped}"])
    assert config.model.critic_path is not None
    assert Path(config.model.critic_path).is_absolute() and (Path(config.model.critic_path) / "config.json").is_file()
