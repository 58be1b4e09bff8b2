"""`run.py export`: from a checkpoint of a trained policy to a folder that transformers and vLLM load."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import run
from common.config import (
    AdvantageEstimator,
    AlgorithmConfig,
    Config,
    CriticFrozen,
    CriticNetwork,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
)
from common.loading import load_config, save_config
from learner.algorithm.disagreement import members
from learner.algorithm.packing import Batch, boundaries
from learner.algorithm.trainer import Trainer
from learner.checkpoint import Checkpointer
from learner.networks.model import load_critic, load_networks
from tests.support.runs import ROOT
from tests.support.tiny_models import naive_logprobs, packed, write_tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # nats, float32: what is promised between vLLM and the learner
PROBE = packed([90], prompt_length=1, seed=4)  # one sequence, every token but the first scored


@dataclass(frozen=True)
class Trained:
    """A run folder with checkpoints of steps 2 and 3, and log-probs and values of PROBE (of each critic) after each."""

    run_dir: Path
    logprobs: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]  # none without a critic


GRPO = AlgorithmConfig(advantage=AdvantageEstimator.grpo, length_adaptive_alpha=None, critic_warmup_steps=0)
VAPO = AlgorithmConfig(critic_warmup_steps=0)


def make_run(
    folder: Path,
    model_path: str,
    vocabulary: int,
    algorithm: AlgorithmConfig = GRPO,
    lora: LoraConfig | None = None,
    critic_network: CriticNetwork = CriticNetwork.separate,
    **model: object,
) -> Trained:
    """Three steps on random responses, saved as the learner saves them."""
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    config = Config(
        name=f"trained_{algorithm.advantage}",
        runs_dir=str(folder),
        model=ModelConfig(path=model_path, critic=critic_network, **model),  # type: ignore[arg-type]
        lora=lora or LoraConfig(),
        algorithm=algorithm,
        learner=LearnerConfig(mini_batches=2, policy=optimizer, critic=optimizer),
    )
    config.run_dir.mkdir()
    save_config(config, config.run_dir / "config.yaml")
    networks = load_networks(config, CPU, None)
    policy, critic = networks.policy, networks.critic
    trainer, logprobs, values = Trainer(config, policy, critic, 0, 1), {}, {}
    with Checkpointer(config.run_dir / "checkpoints", keep=2) as checkpointer:
        for step in (1, 2, 3):
            trainer.step(random_batch(step, vocabulary), version=step - 1, is_warmup=False)
            checkpointer.save(step, step, trainer)
            with torch.no_grad():
                logprobs[step] = policy(*probe(vocabulary), 1.0)[0]
                if critic is not None:
                    values[step] = torch.stack([each(*probe(vocabulary)) for each in members(critic)]).squeeze(0)
    return Trained(config.run_dir, logprobs, values)


def probe(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return PROBE.token_ids_S % vocabulary, PROBE.cu_seqlens_B1, PROBE.prompt_lengths_B


def random_batch(seed: int, vocabulary: int) -> Batch:
    """Two groups of four responses to prompts of three tokens; of each group the first is correct."""
    generator = torch.Generator().manual_seed(seed)
    lengths_B = torch.randint(3, 20, (8,), generator=generator)
    num_tokens = int(lengths_B.sum())
    is_correct_B = torch.arange(8) % 4 == 0
    return Batch(
        token_ids_S=torch.randint(vocabulary, (num_tokens + 8 * 3,), generator=generator),
        cu_seqlens_B1=boundaries(lengths_B + 3),
        prompt_lengths_B=torch.full((8,), 3),
        response_lengths_B=lengths_B,
        behavior_logprobs_T=torch.full((num_tokens,), -3.0),
        versions_T=torch.full((num_tokens,), seed - 1),
        rewards_B=torch.where(is_correct_B, 1.0, -1.0),
        is_correct_B=is_correct_B,
        is_truncated_B=torch.zeros(8, dtype=torch.bool),
        group_index_B=torch.arange(8) // 4,
        loss_mask_T=torch.ones(num_tokens, dtype=torch.bool),
    )


def export(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "export", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120.0,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_what_is_exported_has_the_learners_log_probs_in_transformers_and_in_vllm(tmp_path: Path, is_tied: bool) -> None:
    from actors.engine import Engine
    from tests.support.vllm_support import CHARACTERS, LoopThread, engine_config, make_model

    vocabulary = len(CHARACTERS) + 2
    trained = make_run(tmp_path, make_model(tmp_path / "base", tied=is_tied), vocabulary)
    out = tmp_path / "exported"
    done = export(str(trained.run_dir), "--step", "3", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is is_tied
    assert len({float(trained.logprobs[step].sum()) for step in (1, 2, 3)}) == 3  # training changed the policy
    expected = trained.logprobs[3]

    inputs = PROBE._replace(token_ids_S=probe(vocabulary)[0])
    with torch.no_grad():
        found, _ = naive_logprobs(AutoModelForCausalLM.from_pretrained(out), inputs, 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)

    thread, engine = LoopThread(), Engine(engine_config(str(out)))
    try:
        thread.run(engine.start())
        scored = thread.run(engine.score(inputs.token_ids_S.numpy().astype(np.int32)))
    finally:
        thread.run(engine.shutdown())
        thread.close()
    torch.testing.assert_close(torch.from_numpy(scored), expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("runs")
    return make_run(folder, write_tiny_model(folder / "base"), vocabulary=37)


@pytest.mark.parametrize(("arguments", "step"), [([], 3), (["--step", "2"], 2)])
def test_the_step_that_is_asked_for_is_exported_or_else_the_newest(
    trained: Trained, tmp_path: Path, arguments: list[str], step: int
) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is no obstacle
    assert run.main(["export", str(trained.run_dir), *arguments, "--out", str(out)]) == 0
    found, _ = naive_logprobs(AutoModelForCausalLM.from_pretrained(out), PROBE, 1.0)
    torch.testing.assert_close(found, trained.logprobs[step], rtol=0, atol=1e-5)


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_an_exported_critic_starts_another_run_with_the_values_of_its_checkpoint(tmp_path: Path, is_tied: bool) -> None:
    path = write_tiny_model(tmp_path / "base", is_tied=is_tied)
    trained, out = make_run(tmp_path, path, 37, VAPO), tmp_path / "critic"
    assert run.main(["export", str(trained.run_dir), "--critic", "--step", "2", "--out", str(out)]) == 0
    settings = [f"model.path={path}", f"model.critic_path={out}", "algorithm.critic_warmup_steps=0"]
    critic = load_critic(load_config([], settings), CPU, None)
    with torch.no_grad():
        torch.testing.assert_close(critic(*PROBE), trained.values[2], rtol=0, atol=1e-6)
    assert trained.values[2].std() > 1e-3
    assert not torch.equal(trained.values[2], trained.values[3])


def test_an_exported_critic_with_frozen_attention_is_whole(tmp_path: Path) -> None:
    path, out = write_tiny_model(tmp_path / "base"), tmp_path / "critic"
    trained = make_run(tmp_path, path, 37, VAPO, critic_frozen=CriticFrozen.attention)
    assert run.main(["export", str(trained.run_dir), "--critic", "--out", str(out)]) == 0
    settings = [f"model.path={path}", f"model.critic_path={out}", "algorithm.critic_warmup_steps=0"]
    critic, base = (load_critic(load_config([], settings[:n]), CPU, None) for n in (3, 1))
    with torch.no_grad():
        torch.testing.assert_close(critic(*PROBE), trained.values[3], rtol=0, atol=1e-6)
    is_same = {name: torch.equal(p, critic.get_parameter(name)) for name, p in base.named_parameters()}
    assert all(same is (".self_attn." in name) for name, same in is_same.items())


def test_several_critics_are_exported_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write_tiny_model(tmp_path / "base"), tmp_path / "critics"
    trained = make_run(tmp_path, path, 37, VAPO, num_critics=2)
    assert run.main(["export", str(trained.run_dir), "--critic", "--step", "2", "--out", str(out)]) == 0
    assert "wrote the critics after step 2" in capsys.readouterr().out
    for number in (0, 1):
        settings = [f"model.path={path}", f"model.critic_path={out}/critic_{number}"]
        with torch.no_grad():
            values = load_critic(load_config([], settings), CPU, None)(*PROBE)
        torch.testing.assert_close(values, trained.values[2][number], rtol=0, atol=1e-6)
    assert not torch.allclose(trained.values[2][0], trained.values[2][1])


@pytest.fixture(scope="module", params=list(CriticNetwork))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that trained adapters, of two models or of one, and a separate critic or none."""
    folder = tmp_path_factory.mktemp(f"adapted_{request.param}")
    return make_run(folder, write_tiny_model(folder / "base"), 37, VAPO, LoraConfig(rank=4), request.param)


def test_a_policy_with_an_adapter_is_exported_merged(adapted: Trained, tmp_path: Path) -> None:
    assert run.main(["export", str(adapted.run_dir), "--out", str(tmp_path / "out")]) == 0
    found, _ = naive_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), PROBE, 1.0)
    torch.testing.assert_close(found, adapted.logprobs[3], rtol=0, atol=1e-5)
    assert len({float(adapted.logprobs[step].sum()) for step in (1, 2, 3)}) == 3


def test_an_adapter_alone_is_exported_as_peft_loads_it(
    adapted: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run.main(["export", str(adapted.run_dir), "--step", "2", "--adapter", "--out", str(out)]) == 0
    assert "wrote the policy's adapter after step 2" in capsys.readouterr().out
    model = AutoPeftModelForCausalLM.from_pretrained(out)  # finds the base model by itself
    found, _ = naive_logprobs(model, PROBE, 1.0)
    torch.testing.assert_close(found, adapted.logprobs[2], rtol=0, atol=1e-5)


def test_a_critics_adapter_and_head_are_exported_as_peft_loads_them(adapted: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run.main(["export", str(adapted.run_dir), "--critic", "--adapter", "--out", str(out)]) == 0
    base = adapted.run_dir.parent / "base"
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, str(out)).merge_and_unload()
    tokens, _, _ = probe(37)
    with torch.no_grad():
        hidden = model.base_model(input_ids=tokens[None]).last_hidden_state[0, :-1]
    torch.testing.assert_close(model.score(hidden)[:, 0], adapted.values[3], rtol=0, atol=1e-5)
    assert adapted.values[3].std() > 1e-3


def test_a_merged_critic_starts_another_run_with_its_values(adapted: Trained, tmp_path: Path) -> None:
    out, base = tmp_path / "critic", adapted.run_dir.parent / "base"
    assert run.main(["export", str(adapted.run_dir), "--critic", "--out", str(out)]) == 0
    settings = [f"model.path={base}", f"model.critic_path={out}", "algorithm.critic_warmup_steps=0"]
    with torch.no_grad():
        values = load_critic(load_config([], settings), CPU, None)(*PROBE)
    torch.testing.assert_close(values, adapted.values[3], rtol=0, atol=1e-5)


def test_a_run_that_trains_all_weights_has_no_adapter_to_export(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, str(trained.run_dir), "--adapter", "--out", str(tmp_path / "out"))
    assert "has no adapter: with lora.rank=0" in message
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_critic_has_none_to_export(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, str(trained.run_dir), "--critic", "--out", str(tmp_path / "out"))
    assert "has no critic: algorithm.advantage=grpo" in message
    assert not (tmp_path / "out").exists()


def test_weights_are_stored_in_the_base_models_own_type_unless_another_is_asked_for(tmp_path: Path) -> None:
    base = Path(write_tiny_model(tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    trained = make_run(tmp_path, str(base), 37, VAPO)
    sizes = {}
    for name, extra in {"own": [], "critic": ["--critic"], "float32": ["--dtype", "float32"]}.items():
        out = tmp_path / name
        assert run.main(["export", str(trained.run_dir), *extra, "--out", str(out)]) == 0
        sizes[name] = (out / "model.safetensors").stat().st_size
        assert json.loads((out / "config.json").read_text())["dtype"] == ("float32" if extra[1:] else "bfloat16")
    assert sizes["own"] == pytest.approx((base / "model.safetensors").stat().st_size, rel=0.01)
    assert sizes["float32"] == pytest.approx(2 * sizes["own"], rel=0.2)
    found, _ = naive_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "float32", dtype="auto"), PROBE, 1.0)
    torch.testing.assert_close(found, trained.logprobs[3], rtol=0, atol=1e-5)
    found, _ = naive_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "own", dtype="auto"), PROBE, 1.0)
    torch.testing.assert_close(found.float(), trained.logprobs[3], rtol=0, atol=0.3)


def test_whoever_may_read_the_configuration_may_read_the_weights(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run.main(["export", str(trained.run_dir), "--out", str(out)]) == 0
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which `run.py export` gives up."""
    assert run.main(["export", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def test_an_unknown_step_is_one_sentence(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, str(trained.run_dir), "--step", "1", "--out", str(tmp_path / "out"))
    assert "step 1" in message and "2, 3" in message  # the first was not kept
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained.run_dir, tmp_path / "run")
    piece = run_dir / "checkpoints" / "step_00000003" / "__0_0.distcp"
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    message = refused(capsys, str(run_dir), "--out", str(tmp_path / "out"))
    damaged = "step_00000003 is damaged, it has other bytes than were written in __0_0.distcp: "
    assert message.endswith(f"{damaged}choose --step among 2")
    other = run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp"
    other.write_bytes(bytes(other.stat().st_size))
    message = refused(capsys, str(run_dir), "--out", str(tmp_path / "out"))
    assert message.endswith(f"{damaged}bring its files there from a copy")
    assert not (tmp_path / "out").exists()


def test_an_older_step_than_the_newest_is_not_taken_without_a_word(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained.run_dir, tmp_path / "run")
    piece = run_dir / "checkpoints" / "step_00000003" / "__0_0.distcp"
    os.truncate(piece, piece.stat().st_size // 2)
    torn = "step_00000003 lacks or has other bytes in __0_0.distcp"
    message = refused(capsys, str(run_dir), "--step", "3", "--out", str(tmp_path / "out"))
    assert message.endswith(f"has no checkpoint of step 3 ({torn}): choose --step among 2")
    assert run.main(["export", str(run_dir), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.err == f"{run_dir / 'checkpoints'} is damaged ({torn}): step 2 is taken\n"
    assert "wrote the policy after step 2" in said.out
    (run_dir / "checkpoints" / "step_00000002" / "state.json").unlink()
    message = refused(capsys, str(run_dir), "--out", str(tmp_path / "other"))
    assert "no complete checkpoint: step_00000002 lacks" in message and torn in message


def test_an_older_checkpoint_that_is_torn_is_not_spoken_of(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained.run_dir, tmp_path / "run")
    (run_dir / "checkpoints" / "step_00000002" / "__0_0.distcp").unlink()
    assert run.main(["export", str(run_dir), "--out", str(tmp_path / "out")]) == 0
    assert "damaged" not in capsys.readouterr().err


def test_a_run_without_checkpoints_is_one_sentence(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes((trained.run_dir / "config.yaml").read_bytes())
    message = refused(capsys, str(tmp_path), "--out", str(tmp_path / "out"))
    assert "no complete checkpoint" in message


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{tmp_path} is not a run directory" in refused(capsys, str(tmp_path), "--out", str(tmp_path / "out"))


def test_a_folder_with_something_in_it_is_left_alone(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    message = refused(capsys, str(trained.run_dir), "--out", str(tmp_path))
    assert str(tmp_path) in message and "--out" in message
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_out_that_is_a_file_is_one_sentence(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "--out" in refused(capsys, str(trained.run_dir), "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"
