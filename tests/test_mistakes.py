"""Mistakes of a user, one a row: the documented exit code, one sentence that names the value and the fix, no traceback.

What only the parts know (all impossible combinations of settings, all damages of a model folder) is in their own tests;
this table goes through the command line, as a user does.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from common.loading import RECIPES
from run import main

BASE = RECIPES / "models" / "number_walk"
DEMO = ["-c", "demo", "task.num_train=8", "task.num_heldout=2", "eval.num_prompts=2"]


class Mistake(NamedTuple):
    """`words` are functions of the folder in which the test works."""

    name: str
    argv: Callable[[Path], list[str]]
    says: tuple[str, ...]
    code: int = 2


def demo(*settings: str) -> Callable[[Path], list[str]]:
    """`check` of the demo with these settings; {} is the folder."""
    return lambda folder: ["check", *DEMO, *(setting.replace("{}", str(folder)) for setting in settings)]


def command(*words: str) -> Callable[[Path], list[str]]:
    """{} is the folder."""
    return lambda folder: [word.replace("{}", str(folder)) for word in words]


def data(content: str | bytes, *settings: str, name: str = "train.jsonl") -> Callable[[Path], list[str]]:
    """A training file of this content, beside a good held-out one."""

    def argv(folder: Path) -> list[str]:
        heldout, train = folder / "heldout.jsonl", folder / name
        heldout.write_text(row(prompt="2 to 5:", answer="5"))
        train.write_bytes(content if isinstance(content, bytes) else content.encode())
        files = ["task.name=file", f"task.heldout_file={heldout}", f"task.train_file={train}"]
        given = [setting.replace("{}", str(folder)) for setting in settings]
        return [
            "check",
            "-c",
            "demo",
            *files,
            f"model.path={BASE}",
            "rollout.max_tokens=64",
            "eval.num_prompts=1",
            *given,
        ]

    return argv


def row(**columns: Any) -> str:
    return json.dumps(columns) + "\n"


def model(**files: str | bytes | None) -> Callable[[Path], list[str]]:
    """The demo with its model folder, of which these files (. is __ here) are others, or (None) missing."""

    def argv(folder: Path) -> list[str]:
        copy = folder / "model"
        shutil.copytree(BASE, copy)
        for name, content in files.items():
            file = copy / name.replace("__", ".")
            file.unlink()
            if content is not None:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["check", *DEMO, f"model.path={copy}"]

    return argv


def config_json(**settings: Any) -> str:
    return json.dumps(json.loads((BASE / "config.json").read_text()) | settings)


def written(words: list[str], **files: str) -> Callable[[Path], list[str]]:
    """A command after these files (/ is __ here, . is _dot_) were written."""

    def argv(folder: Path) -> list[str]:
        for name, content in files.items():
            file = folder / name.replace("__", "/").replace("_dot_", ".")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return command(*words)(folder)

    return argv


CONFIG = [
    Mistake("no_such_recipe", command("check", "-c", "demmo"), ("no configuration file demmo", "recipes", "demo")),
    Mistake("no_model", command("check"), ("model.path is not set: add model.path=VALUE",)),
    Mistake(
        "yaml_that_breaks_off",
        written(["check", "-c", "{}/a.yaml"], a_dot_yaml="learner: [1\n"),
        ("a.yaml is not readable YAML", "line 1"),
    ),
    Mistake(
        "yaml_of_a_list",
        written(["check", "-c", "{}/a.yaml"], a_dot_yaml="- 1\n"),
        ("a.yaml must hold a mapping of settings",),
    ),
    Mistake("misspelt", demo("learner.step=3"), ("learner.step", "did you mean learner.steps?")),
    Mistake("wrong_section", demo("learner.max_staleness=3"), ("did you mean staleness.max_staleness?",)),
    Mistake("a_word_for_a_number", demo("learner.steps=many"), ("learner.steps=many", "Integer")),
    Mistake("no_setting", demo("fast"), ("'fast'", "section.key=value")),
    Mistake("no_such_choice", demo("algorithm.advantage=gea"), ("algorithm.advantage=gea", "gae, grpo, rloo")),
    Mistake("negative", demo("learner.steps=-1"), ("learner.steps=-1", "at least 0")),
    Mistake("not_a_number", demo("algorithm.gamma=nan"), ("algorithm.gamma=nan",)),
    Mistake("top_p_in_training", demo("rollout.top_p=0.9"), ("importance weights are wrong", "eval.top_p")),
    Mistake("no_such_variable", demo("name=${oc.env:NO_SUCH_VARIABLE}"), ("NO_SUCH_VARIABLE",)),
    Mistake("name_with_a_slash", demo("name=a/b"), ("name='a/b'", "runs_dir")),
    Mistake(
        "off_policy_and_synchronous", demo("staleness.max_staleness=0", "weights.publish_every=2"), ("publish_every=2",)
    ),
    Mistake("longer_than_the_model", demo("model.max_model_len=4096"), ("model.max_model_len=4096", "lower it")),
    Mistake("no_room_for_a_prompt", demo("rollout.max_tokens=128"), ("rollout.max_tokens=128", "max_model_len=128")),
    Mistake("one_response_a_group", demo("rollout.group_size=1", "algorithm.advantage=grpo"), ("group_size=1",)),
    Mistake("ranks_that_do_not_divide", demo("learner.ranks=4", "learner.replicas=3"), ("replicas=3", "ranks=4")),
    Mistake("nccl_on_a_cpu", demo("weights.backend=nccl"), ("weights.backend=nccl", "use gloo")),
    Mistake(
        "a_gpu_that_is_not_there",
        command("train", *DEMO, "device=cuda", "runs_dir={}/runs"),
        ("device=cuda", "use device=cpu"),
    ),
    Mistake(
        "resume_with_a_recipe", command("train", "-c", "demo", "--resume", "{}"), ("leave out -c and --overwrite",)
    ),
    Mistake("resume_what_is_no_run", command("train", "--resume", "{}"), ("is not a run directory", "config.yaml")),
    Mistake("replay_what_is_no_run", command("train", "--replay", "{}/none"), ("none is not a run directory",)),
    Mistake(
        "an_earlier_run",
        written(["train", *DEMO, "runs_dir={}", "name=old"], old__config_dot_yaml="name: old\n"),
        ("old already holds a run", "--overwrite", "--resume"),
    ),
]

DATA = [
    Mistake("no_such_file", data("", "task.train_file={}/none.jsonl"), ("none.jsonl: there is no such file",)),
    Mistake("no_such_task", demo("task.name=walk"), ("task.name is 'walk'", "chain_sum, number_walk, file")),
    Mistake("another_format", data("prompt,answer\n", name="train.csv"), ("train.csv", ".jsonl or .parquet")),
    Mistake("an_empty_file", data(""), ("train.jsonl: the file is empty",)),
    Mistake("no_json", data("{\n"), ("train.jsonl, line 1: not valid JSON",)),
    Mistake("no_utf8", data('{"prompt": "\u00e9"}\n'.encode("latin-1")), ("train.jsonl, line 1", "UTF-8")),
    Mistake(
        "a_broken_parquet", data(b"PAR1rest", name="train.parquet"), ("train.parquet: not a readable Parquet file",)
    ),
    Mistake("no_prompt", data(row(answer="5")), ("column 'prompt' is missing", "task.prompt_field")),
    Mistake("no_answer", data(row(prompt="1 to 5:")), ("column 'answer' is missing", "task.answer_field")),
    Mistake(
        "another_column", data(row(prompt="1", answer="5"), "task.prompt_field=q"), ("'q' is missing", "answer, prompt")
    ),
    Mistake("a_blank_prompt", data(row(prompt=" ", answer="5")), ("line 1", "not blank", "task.on_bad_row=drop")),
    Mistake("nan_for_an_answer", data('{"prompt": "1 to 5:", "answer": NaN}\n'), ("'answer' is nan",)),
    Mistake(
        "the_assistant_has_the_last_word",
        data(row(prompt=[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}], answer="5")),
        ("line 1", "ends with the assistant's turn"),
    ),
    Mistake(
        "a_conversation_without_a_template",
        data(row(prompt=[{"role": "user", "content": "1"}], answer="5")),
        ("has no chat_template", "instruction-tuned"),
    ),
    Mistake(
        "too_long", data(row(prompt="1 " * 400, answer="5")), ("line 1", "rollout.max_tokens=64", "max_model_len=464")
    ),
    Mistake("unknown_to_the_tokenizer", data(row(prompt="\u4f60", answer="5")), ("line 1", "no tokens")),
    Mistake("held_out_too", data(row(prompt="2 to 5:", answer="5")), ("train.jsonl, line 1", "heldout.jsonl, line 1")),
    Mistake(
        "a_negative_weight",
        data("", "task.train_files=[{path: {}/heldout.jsonl, weight: -1}]", "task.train_file=null"),
        ("weight=-1.0", "above 0"),
    ),
    Mistake("more_prompts_than_there_are", demo("eval.num_prompts=9"), ("eval.num_prompts=9", "task.num_heldout=2")),
]

MODEL = [
    Mistake("no_folder", demo("model.path=/no/such/model"), ("model.path=/no/such/model", "run.py prepare")),
    Mistake("no_critic", demo("model.critic_path=/no/such/model"), ("model.critic_path=/no/such/model",)),
    Mistake("not_in_the_cache", demo("model.path=Nobody/Nothing"), ("model.path=Nobody/Nothing", "hf download")),
    Mistake("no_configuration", model(config__json=None), ("no config.json there",)),
    Mistake("a_broken_configuration", model(config__json="{"), ("config.json is not JSON", "fetch it again")),
    Mistake("no_weights", model(model__safetensors=None), ("has no weights", "complete model folder")),
    Mistake(
        "a_pointer",
        model(model__safetensors="version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("model.safetensors is a pointer", "git lfs pull"),
    ),
    Mistake(
        "cut_off",
        model(model__safetensors=(BASE / "model.safetensors").read_bytes()[:4000]),
        ("model.safetensors", "fetch it again"),
    ),
    Mistake("no_tokenizer", model(tokenizer__json=None), ("has no tokenizer (no tokenizer.json there)",)),
    Mistake("a_broken_tokenizer", model(tokenizer__json="{"), ("tokenizer.json is not JSON", "fetch it again")),
    Mistake(
        "a_small_embedding",
        model(config__json=config_json(vocab_size=3)),
        ("ends at id 2", "the model's own tokenizer"),
    ),
    Mistake(
        "an_unknown_kind", model(config__json=config_json(model_type="nothing")), ("`nothing`", "trust_remote_code")
    ),
    Mistake(
        "quantised",
        model(config__json=config_json(quantization_config={"quant_method": "gptq"})),
        ("quantised", "gptq", "unquantised"),
    ),
    Mistake(
        "capped", model(config__json=config_json(final_logit_softcapping=30.0)), ("caps its logits", "another model")
    ),
    Mistake("no_such_base", command("prepare", "walk"), ("'walk'", "chain_sum, number_walk, contrary_walk")),
]

VERIFIER = [
    Mistake(
        "no_such_module", demo("verifier.function=nowhere:verify"), ('"nowhere:verify"', "No module named 'nowhere'")
    ),
    Mistake("no_such_function", demo("verifier.function=json:verify"), ('"json:verify"', "no attribute 'verify'")),
    Mistake("no_function", demo("verifier.function=json:__name__"), ("is a str, not a function",)),
    Mistake("other_arguments", demo("verifier.function=json:dumps"), ("called as dumps(response, reference, row)",)),
    Mistake("no_colon", demo("verifier.function=json.dumps"), ("verifier.function=json.dumps", "module:function")),
    Mistake("no_such_form", demo("verifier.answer_form=any"), ('answer_form is "any"', "number_walk:verify")),
    Mistake("rewards_upside_down", demo("reward.correct=-1"), ("reward.correct=-1",)),
    Mistake("no_cases", command("grade", "{}/none.jsonl"), ("none.jsonl is not a file",)),
    Mistake(
        "cases_without_gold", written(["grade", "{}/a.jsonl"], a_dot_jsonl="{}\n"), ("line 1", '"gold" and "pred"')
    ),
]

NETWORK = [
    Mistake("no_such_port", demo("transport.port=70000"), ("transport.port=70000", "65535")),
    Mistake("no_host", demo("transport.host=a host"), ("transport.host='a host'", "without a port")),
    Mistake(
        "host_and_port", demo("transport.host=127.0.0.1:5555"), ("transport.host='127.0.0.1:5555'", "without a port")
    ),
    Mistake("any_address_advertised", demo("transport.advertise_host=0.0.0.0"), ("advertise_host=0.0.0.0",)),
    Mistake("impatient", demo("transport.heartbeat_timeout_s=0.1"), ("heartbeat_timeout_s=0.1", "heartbeat_s")),
    Mistake("keys_without_use", demo("transport.keys=k", "transport.curve=off"), ("transport.keys=k", "curve=off")),
    Mistake(
        "another_scheme",
        command("actor", "--connect", "http://learner", "--name", "a", "-c", "demo"),
        ("--connect http://learner", "tcp://HOST:PORT or file:PATH"),
    ),
    Mistake(
        "no_port",
        command("actor", "--connect", "tcp://127.0.0.1", "--name", "a", "-c", "demo"),
        ("--connect tcp://127.0.0.1 must be tcp://HOST:PORT",),
    ),
    Mistake(
        "no_name",
        command("actor", "--connect", "tcp://127.0.0.1:1", "--name", "a b", "-c", "demo"),
        ("--name 'a b' must be 1 to 100 letters",),
    ),
    Mistake(
        "no_keys",
        command("actor", "--connect", "tcp://127.0.0.1:1", "--name", "a", "--keys", "{}/none", "-c", "demo"),
        ("actor a has no keys", "--keys"),
    ),
    Mistake(
        "nobody_writes_the_address",
        command("actor", "--connect", "file:{}/none", "--name", "a", "-c", "demo", "actors.start_timeout_s=0.01"),
        ("no learner wrote its address to", "within 0.01 s"),
        code=1,
    ),
    Mistake("no_live_run", command("actors", "{}", "--count", "2"), ("no `train` that runs on this machine answers",)),
    Mistake("less_than_none", command("actors", "{}", "--count", "-2"), ("--count -2 must be 0 or more",)),
    Mistake("an_actor_without_a_name", command("keygen", "{}/keys", "--actor", "a/b"), ("--actor 'a/b'", "letters")),
]

DISK = [
    Mistake("inspect_nothing", command("inspect", "{}/none"), ("none is not a run directory",)),
    Mistake(
        "inspect_what_has_not_begun",
        written(["inspect", "{}/a"], a__config_dot_yaml="name: a\n"),
        ("has no metrics.jsonl yet", "logs"),
    ),
    Mistake(
        "inspect_what_is_damaged",
        written(["inspect", "{}/a"], a__config_dot_yaml="name: a\n", a__metrics_dot_jsonl="{x\n{}\n"),
        ("metrics.jsonl line 1 is not JSON",),
    ),
    Mistake("export_nothing", command("export", "{}/none", "--out", "{}/out"), ("none is not a run directory",)),
    Mistake(
        "a_file_for_runs",
        written(["train", *DEMO, "runs_dir={}/a"], a=""),
        ("a/demo cannot be made", "choose another runs_dir"),
    ),
    Mistake("a_file_for_keys", written(["keygen", "{}/a"], a=""), ("keys cannot be made", "name a folder")),
    Mistake("a_file_for_data", written(["check", *DEMO, "--data", "{}/a"], a=""), ("a cannot be written",), code=1),
    Mistake(
        "a_file_for_a_model", written(["prepare", "chain_sum", "--out", "{}/a"], a=""), ("a cannot be written",), code=1
    ),
]

EVALUATION = [
    Mistake("eval_of_nothing", command("eval", "{}/none"), ("none is not a Hugging Face model folder",)),
    Mistake("eval_of_a_step", command("eval", str(BASE), "--step", "3"), ("--step 3 is of a run", "leave it out")),
    Mistake("eval_without_file", command("eval", str(BASE), "--data", "{}/a.jsonl"), ("there is no such file",)),
    Mistake("eval_of_no_prompt", command("eval", str(BASE), "--prompts", "0"), ("--prompts 0 must be at least 1",)),
    Mistake("eval_without_samples", command("eval", str(BASE), "--samples", "0"), ("eval.samples_per_prompt=0 must",)),
    Mistake(
        "eval_of_a_run_without_export",
        written(["eval", "{}/a"], a__config_dot_yaml=f"model: {{path: {BASE}}}\n"),
        ("has no final export yet", "--step"),
    ),
    Mistake(
        "eval_into_something_else",
        written(["eval", str(BASE), *DEMO, "--out", "{}/a"], a__thesis_dot_tex="x"),
        ("is not empty and holds no evaluation", "choose another --out"),
    ),
    Mistake(
        "eval_by_a_column_that_is_not_there",
        command("eval", str(BASE), *DEMO, "--by", "topic"),
        ("--by topic", "there is: start, target"),
    ),
]

TABLE = [*CONFIG, *DATA, *MODEL, *VERIFIER, *NETWORK, *DISK, *EVALUATION]


@pytest.mark.parametrize("mistake", TABLE, ids=[mistake.name for mistake in TABLE])
def test_a_mistake_ends_in_one_sentence(mistake: Mistake, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(mistake.argv(tmp_path)) == mistake.code
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: "), said
    assert "Traceback" not in said
    assert all(words in said for words in mistake.says), said


def test_the_table_is_long_and_names_each_mistake_once() -> None:
    assert len({mistake.name for mistake in TABLE}) == len(TABLE) >= 60
