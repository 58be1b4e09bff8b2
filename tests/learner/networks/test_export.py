"""Networks written as Hugging Face folders: transformers, and the learner itself, read back what was trained."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from common.causes import disk_problem
from learner.networks.export import export_critic, export_policy
from learner.networks.model import Policy, load_critic, load_policy
from tests.support.tiny_models import naive_logprobs, packed, tiny_run, write_tiny_mixture, write_tiny_model

CPU = torch.device("cpu")
LENGTHS = [9, 4, 17, 9, 3, 30, 16]


def policy_of(folder: Path, is_tied: bool = False, tie: bool | None = None) -> Policy:
    return load_policy(tiny_run(write_tiny_model(folder, is_tied=is_tied), tie=tie), CPU, None)


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("override", [None, False, True])
def test_export_loads_in_transformers_with_equal_log_probs(
    tmp_path: Path, is_tied: bool, override: bool | None
) -> None:
    policy = policy_of(tmp_path / "base", is_tied=is_tied, tie=override)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    export_policy(policy, tmp_path / "base", tmp_path / "out")
    expects_tied = is_tied if override is None else override
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is expects_tied
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    names = [name for name, _ in policy.named_hf_parameters()]
    assert ("lm_head.weight" in names) is not expects_tied
    assert len(names) == len(set(names))
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    inputs = packed(LENGTHS)
    torch.testing.assert_close(
        policy(*inputs, 1.0, with_entropy=True), naive_logprobs(model, inputs, 1.0), rtol=0, atol=1e-5
    )


def test_export_in_bfloat16_stores_bfloat16(tmp_path: Path) -> None:
    export_policy(policy_of(tmp_path / "base"), tmp_path / "base", tmp_path / "out", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_export_in_several_shards_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.networks.pretrained.SHARD_BYTES", 6000)
    policy = policy_of(tmp_path / "base")
    export_policy(policy, tmp_path / "base", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    assert not list((tmp_path / "out").glob("*.partial"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, p), q in zip(policy.model.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_an_exported_critic_has_the_same_values_at_critic_path_and_in_transformers(
    tmp_path: Path, architecture: str, is_tied: bool
) -> None:
    path = write_tiny_model(tmp_path / "base", architecture, is_tied)
    critic, inputs = load_critic(tiny_run(path), CPU, None), packed(LENGTHS)
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        values = critic(*inputs)
    assert values.std() > 0.1
    export_critic(critic, path, tmp_path / "critic")
    assert (tmp_path / "critic" / "tokenizer.json").is_file()

    again = load_critic(tiny_run(path, critic_path=str(tmp_path / "critic")), CPU, None)
    with torch.no_grad():
        assert torch.equal(again(*inputs), values)

    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    assert model.config.num_labels == 1
    with torch.no_grad():
        found = [
            model.score(model.base_model(input_ids=tokens[None]).last_hidden_state)[0, 1:-1, 0]
            for tokens in inputs.token_ids_S.split(LENGTHS)
        ]
    torch.testing.assert_close(torch.cat(found), values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_a_critic_of_experts_is_exported_as_the_checkpoint_holds_them(tmp_path: Path, architecture: str) -> None:
    path, inputs = write_tiny_mixture(tmp_path / "base", architecture), packed(LENGTHS)
    critic = load_critic(tiny_run(path), CPU, None)
    torch.nn.init.normal_(critic.head.weight)
    export_critic(critic, path, tmp_path / "critic")
    stored, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "critic", tmp_path / "base"))
    assert stored.keys() - base.keys() == {"score.weight"}
    again = load_critic(tiny_run(path, critic_path=str(tmp_path / "critic")), CPU, None)
    with torch.no_grad():
        assert torch.equal(again(*inputs), critic(*inputs))


def test_a_critic_without_a_class_in_transformers_is_refused_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "base")
    critic = load_critic(tiny_run(path), CPU, None)
    monkeypatch.setattr("learner.networks.export.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    with pytest.raises(ValueError, match=r"Qwen2Model cannot be exported: transformers has no sequence classification"):
        export_critic(critic, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_critic_with_another_vocabulary_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "base")
    export_critic(load_critic(tiny_run(path), CPU, None), path, tmp_path / "critic")
    settings = json.loads((tmp_path / "base" / "config.json").read_text()) | {"vocab_size": 40}
    (tmp_path / "base" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"critic_path=.*critic knows 37 tokens, the policy has 40"):
        load_critic(tiny_run(path, critic_path=str(tmp_path / "critic")), CPU, None)


@pytest.mark.parametrize(("limit", "file"), [(100, "generation_config.json"), (10_000, "shard-00000.partial")])
def test_a_folder_that_cannot_be_written_is_one_sentence_about_the_file(tmp_path: Path, limit: int, file: str) -> None:
    """A limit on the size of files stands for a disk that is full, first for a copy, then for safetensors."""
    policy = policy_of(tmp_path / "base")
    with pytest.raises(OSError) as raised:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            export_policy(policy, tmp_path / "base", tmp_path / "out")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sentence = "cannot be written, the file would be larger than allowed: raise the limit (ulimit -f)"
    assert disk_problem(raised.value) == f"{tmp_path / 'out' / file} {sentence}"
