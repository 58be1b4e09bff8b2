"""The learner's networks: packed attention, chunked log-probs, tied and untied heads, export, sharding."""

import dataclasses
import functools
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForSequenceClassification

from common.config import Config, ConfigError, CriticFrozen, Device, DType, LearnerConfig, ModelConfig
from learner.networks import attention
from learner.networks import logprobs as logprobs_module
from learner.networks.export import export_policy
from learner.networks.logprobs import token_logprobs
from learner.networks.model import Policy, load_critic, load_policy
from learner.networks.parallel import make_mesh, process_group
from learner.networks.prefixes import shared_prefixes
from tests.support.ranks import run_two_ranks
from tests.support.tiny_models import (
    VOCAB,
    Packed,
    naive_logprobs,
    packed,
    pick,
    tiny_config,
    tiny_run,
    write_tiny_mixture,
    write_tiny_model,
)

CPU = torch.device("cpu")
LENGTHS = [9, 4, 17, 9, 3, 30, 16]


def policy_of(folder: Path, architecture: str = "qwen2", is_tied: bool = False, **run: object) -> Policy:
    return load_policy(tiny_run(write_tiny_model(folder, architecture, is_tied), **run), CPU, None)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_packed_logprobs_and_gradients_equal_full_logits_one_by_one(
    tmp_path: Path, architecture: str, is_tied: bool
) -> None:
    policy = policy_of(tmp_path, architecture, is_tied)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = packed(LENGTHS)
    weights = torch.randn(2, sum(LENGTHS) - 2 * len(LENGTHS), generator=torch.Generator().manual_seed(1))
    for with_entropy in (False, True):
        logprobs, entropy = policy(*inputs, 0.7, with_entropy=with_entropy)
        expected, expected_entropy = naive_logprobs(reference, inputs, 0.7)
        torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
        loss, expected_loss = logprobs @ weights[0], expected @ weights[0]
        if with_entropy:
            torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=1e-5)
            loss, expected_loss = loss + entropy @ weights[1], expected_loss + expected_entropy @ weights[1]
        else:
            assert entropy is None
        loss.backward()
        expected_loss.backward()
        for (name, p), q in zip(policy.model.named_parameters(), reference.parameters(), strict=True):
            # float32 rounding, which grows with the gradient: 1e-6 to 2.5e-6 of its norm, depending on the processor
            assert float((p.grad - q.grad).norm() / q.grad.norm()) < 1e-5, name
        policy.zero_grad()
        reference.zero_grad()


def test_changing_one_sequence_leaves_its_neighbours_bit_equal(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    inputs = packed(LENGTHS)
    before, _ = policy(*inputs, 1.0)
    changed = inputs.token_ids_S.clone()
    changed[13:30] = (changed[13:30] + 5) % VOCAB  # the third sequence, 17 tokens, which shares a bucket
    after, _ = policy(changed, *inputs[1:], 1.0)
    mine = torch.zeros(len(before), dtype=torch.bool)
    mine[9:24] = True
    assert torch.equal(before[~mine], after[~mine])
    assert not torch.isclose(before[mine], after[mine]).any()


def test_a_nan_in_one_sequence_stays_there(tmp_path: Path) -> None:
    policy = policy_of(tmp_path, is_tied=False)
    inputs = packed(LENGTHS)
    tokens = inputs.token_ids_S.clone()
    tokens[tokens == VOCAB - 1] = 0
    tokens[13:30] = VOCAB - 1
    before, _ = policy(tokens, *inputs[1:], 1.0)
    policy.model.get_input_embeddings().weight.data[VOCAB - 1] = torch.nan
    after, _ = policy(tokens, *inputs[1:], 1.0)
    assert after[9:24].isnan().all()
    assert torch.equal(before[:9], after[:9])
    assert torch.equal(before[24:], after[24:])


def test_order_of_sequences_changes_nothing(tmp_path: Path) -> None:
    policy, critic = policy_of(tmp_path), load_critic(tiny_run(str(tmp_path)), CPU, None)
    torch.nn.init.normal_(critic.head.weight)
    inputs, order = packed(LENGTHS), [5, 2, 0, 6, 1, 4, 3]
    sizes = [length - 2 for length in LENGTHS]
    for outputs, shuffled in [
        (policy(*inputs, 1.0)[0], policy(*pick(inputs, order), 1.0)[0]),
        (critic(*inputs), critic(*pick(inputs, order))),
    ]:
        expected = torch.cat([outputs.split(sizes)[i] for i in order])
        torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-5)


def test_sliding_window_equals_the_reference(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    settings["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    policy = load_policy(tiny_run(str(tmp_path)), CPU, None)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    inputs = packed(LENGTHS)
    torch.testing.assert_close(
        policy(*inputs, 1.0, with_entropy=True), naive_logprobs(reference, inputs, 1.0), rtol=0, atol=1e-5
    )


def test_values_sit_at_the_position_that_predicts_each_token_and_start_at_zero(tmp_path: Path) -> None:
    critic = load_critic(tiny_run(write_tiny_model(tmp_path)), CPU, None)
    inputs = packed([5, 8], prompt_length=3)
    assert critic(*inputs).tolist() == [0.0] * 7
    torch.nn.init.normal_(critic.head.weight)
    values = critic(*inputs)
    last = inputs.token_ids_S.clone()
    last[4] = (last[4] + 1) % VOCAB  # the last token of the first sequence predicts nothing
    assert torch.equal(critic(last, *inputs[1:]), values)
    values.square().sum().backward()
    assert all(p.grad is not None for p in critic.parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama"])
def test_a_critic_with_frozen_attention_trains_all_the_rest(tmp_path: Path, architecture: str) -> None:
    run = tiny_run(write_tiny_model(tmp_path, architecture))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, critic_frozen=CriticFrozen.attention))
    policy, critic = load_policy(run, CPU, None), load_critic(run, CPU, None)
    torch.nn.init.normal_(critic.head.weight)
    (critic(*packed([5, 8])).sum() + policy(*packed([5, 8]), 1.0)[0].sum()).backward()
    frozen = {name for name, p in critic.named_parameters() if p.grad is None}
    assert frozen == {name for name, _ in critic.named_parameters() if ".self_attn." in name} != set()
    assert any("_norm" in name for name in frozen) is (architecture == "qwen3")  # of queries and keys
    assert all(p.grad is not None for p in policy.parameters())


def test_critic_and_policy_share_no_weights(tmp_path: Path) -> None:
    config = tiny_run(write_tiny_model(tmp_path))
    policy, critic = load_policy(config, CPU, None), load_critic(config, CPU, None)
    storages = {p.data_ptr() for p in policy.parameters()}
    assert storages.isdisjoint(p.data_ptr() for p in critic.parameters())
    first = next(policy.parameters())
    assert torch.equal(first, next(critic.parameters()))


def test_critic_path_takes_the_head_of_a_value_model(tmp_path: Path) -> None:
    model = Qwen2ForSequenceClassification(
        Qwen2Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCAB,
            num_labels=1,
            pad_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "value")
    path = write_tiny_model(tmp_path / "policy")
    critic = load_critic(tiny_run(path, critic_path=str(tmp_path / "value")), CPU, None)
    inputs = packed([6], prompt_length=1)
    hidden = model.model(input_ids=inputs.token_ids_S[None]).last_hidden_state
    torch.testing.assert_close(critic(*inputs), model.score(hidden)[0, :5, 0], rtol=0, atol=1e-5)


def test_an_empty_micro_batch_gives_zero_gradients_everywhere(tmp_path: Path) -> None:
    config = tiny_run(write_tiny_model(tmp_path))
    empty = packed([])
    policy, critic = load_policy(config, CPU, None), load_critic(config, CPU, None)
    logprobs, entropy = policy(*empty, 1.0, with_entropy=True)
    values = critic(*empty)
    assert (len(logprobs), len(entropy), len(values)) == (0, 0, 0)
    (logprobs.sum() + entropy.sum() + values.sum()).backward()
    for parameter in [*policy.parameters(), *critic.parameters()]:
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_activation_checkpointing_of_some_layers_or_all_changes_no_bit_and_keeps_less(tmp_path: Path) -> None:
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(tiny_config(num_layers=4)).save_pretrained(tmp_path)
    inputs, grads, kept = packed(LENGTHS), [], {}
    for n in (0, 1, 2, 3):
        policy = load_policy(tiny_run(str(tmp_path), activation_checkpointing=n), CPU, None)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            loss = policy(*inputs, 1.0)[0].sum()
        kept[n] = sum(sizes)
        loss.backward()
        grads.append([p.grad for p in policy.parameters()])
    assert all(torch.equal(p.grad, q) for same in grads for p, q in zip(policy.parameters(), same, strict=True))
    assert kept[1] < kept[2] < kept[3] < kept[0]  # four, two, one and no layers keep their input only


def test_compiled_layers_compute_the_same_for_any_number_of_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as for a GPU, without the code generator, which would need a C++ compiler here."""
    path = write_tiny_model(tmp_path)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setenv("CXX", sys.executable)  # it is not asked for anything
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # as a test with an engine leaves it in this process
    settings = {"activation_checkpointing": 2}
    plain, compiled = (load_policy(tiny_run(path, compile=is_on, **settings), CPU, None) for is_on in (False, True))
    torch.compiler.reset()
    for lengths in (LENGTHS, LENGTHS[:4], [11]):
        for policy in (plain, compiled):
            policy.zero_grad()
            policy(*packed(lengths), 1.0)[0].sum().backward()
        for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8  # parts of a layer, with and without gradients; not one for each length and layer


def test_compiling_without_a_compiler_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"learner\.compile=true needs a C\+\+ compiler .* no-such-compiler"):
        policy_of(tmp_path, compile=True)


@pytest.mark.parametrize("takes_groups", [True, False])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_the_cuda_path_hands_the_kernel_what_it_expects(
    monkeypatch: pytest.MonkeyPatch, window: int | None, takes_groups: bool, shares_prefixes: bool
) -> None:
    """A stand-in for the kernel, by its documentation, and flash-attention's for more keys than queries: there may be
    no GPU here. torch 2.11 knows no enable_gqa."""
    signature = inspect.signature(varlen_attn)
    if not takes_groups:
        known = [one for name, one in signature.parameters.items() if name != "enable_gqa"]
        signature = signature.replace(parameters=known)

    def kernel(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(q, k, v, *args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        is_grouped = call.get("enable_gqa", False)
        assert is_grouped or k.shape[1] == v.shape[1] == q.shape[1]
        assert call["cu_seq_q"].dtype is call["cu_seq_k"].dtype is torch.int32
        query_lengths, key_lengths = (call[f"cu_seq_{name}"].diff().tolist() for name in "qk")
        assert (call["max_q"], call["max_k"]) == (max(query_lengths), max(key_lengths))
        left, right = call["window_size"]
        outputs = []
        for one in zip(q.split(query_lengths), k.split(key_lengths), v.split(key_lengths), strict=True):
            num_queries, num_keys = len(one[0]), len(one[1])
            distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
            mask = (distance >= -right) & ((distance <= left) | (left == -1))
            heads = [x.transpose(0, 1)[None] for x in one]
            out = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=call["scale"], enable_gqa=is_grouped)
            outputs.append(out[0].transpose(0, 1))
        return torch.cat(outputs)

    kernel.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    torch.manual_seed(0)
    packing = attention.Packing.from_lengths(LENGTHS, CPU)
    if shares_prefixes:
        tokens, ends, _ = packed(LENGTHS)
        tokens[13:17] = tokens[:4]  # two sequences of which one begins as the other
        packing = attention.Packing.from_prefixes(shared_prefixes(tokens, ends), CPU)
        assert packing.lengths != packing.keys.lengths
    q, k, v = (torch.randn(1, heads, sum(packing.lengths), 8) for heads in (4, 2, 2))
    expected = attention._attend_batched(q, k, v, packing, 0.3, window)
    found = attention._attend_varlen(q, k, v, packing, 0.3, window)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("vocab", [500, 40_000])
def test_no_tensor_exceeds_one_tile_of_logits(vocab: int) -> None:
    tokens, width, chunk = 700, 8, 32
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    with LargestTensor() as largest:
        logprobs, entropy = token_logprobs(
            hidden, weight, targets, temperature=1.0, chunk_tokens=chunk, with_entropy=True
        )
        (logprobs.sum() + entropy.sum()).backward()
    tile = chunk * min(vocab, logprobs_module.TILE_WIDTH["cpu"])
    assert largest.elements <= max(tile, vocab * width, tokens * width)


@pytest.mark.parametrize("tile", [1, 7, 33, 98])
def test_tiles_of_the_vocabulary_change_log_probs_entropy_and_gradients_by_rounding_only(
    tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against autograd through whole rows of logits; one row is so sharp that its entropy is next to zero."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, dtype=torch.float32)
    hidden[0] *= 30.0
    weight, targets = torch.randn(99, 16), torch.randint(99, (50,))
    slopes = torch.randn(2, 50)

    def gradients(of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        outputs = of(h, w)
        loss = (slopes * torch.stack(outputs)).sum()
        return (*(output.detach() for output in outputs), *torch.autograd.grad(loss, (h, w)))

    def whole_rows(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(h @ w.T / 0.5, -1)
        return logp[torch.arange(50), targets], -(logp.exp() * logp).sum(-1)

    def tiled(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return token_logprobs(h, w, targets, temperature=0.5, chunk_tokens=20, with_entropy=True)

    monkeypatch.setitem(logprobs_module.TILE_WIDTH, "cpu", tile)
    torch.testing.assert_close(gradients(tiled), gradients(whole_rows), rtol=1e-4, atol=3e-5)


def test_chunk_size_changes_log_probs_by_rounding_only() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16), torch.randn(99, 16)
    targets = torch.randint(99, (50,))
    whole = token_logprobs(hidden, weight, targets, temperature=0.5, chunk_tokens=64, with_entropy=True)
    for chunk in (1, 7, 50):
        parts = token_logprobs(hidden, weight, targets, temperature=0.5, chunk_tokens=chunk, with_entropy=True)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
        alone, none = token_logprobs(hidden, weight, targets, temperature=0.5, chunk_tokens=chunk)
        assert torch.equal(alone, parts[0]) and none is None  # the entropy is work of its own and changes no log-prob


def test_specs_describe_the_published_tensors(tmp_path: Path) -> None:
    policy = policy_of(tmp_path)
    for spec, (name, tensor) in zip(
        policy.hf_specs(torch.bfloat16), policy.named_hf_parameters(torch.bfloat16), strict=True
    ):
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape))


@pytest.mark.parametrize("architecture", ["qwen3_moe", "mixtral"])
def test_fused_experts_are_published_and_exported_as_the_checkpoint_holds_them(
    tmp_path: Path, architecture: str
) -> None:
    """transformers fuses the experts of a layer into one parameter; checkpoints and vLLM know them one by one."""
    policy = load_policy(tiny_run(write_tiny_mixture(tmp_path / "base", architecture)), CPU, None)
    stored = load_file(tmp_path / "base" / "model.safetensors")
    published = dict(policy.named_hf_parameters())
    assert published.keys() == stored.keys() != dict(policy.model.named_parameters()).keys()
    assert all(torch.equal(published[name], tensor) for name, tensor in stored.items())
    for spec, (name, tensor) in zip(policy.hf_specs(), policy.named_hf_parameters(), strict=True):
        assert (spec.name, spec.dtype, spec.shape) == (name, tensor.dtype, tuple(tensor.shape))
    inputs = packed(LENGTHS)
    policy(*inputs, 1.0)[0].sum().backward()
    torch.optim.SGD(policy.parameters(), lr=1e-3).step()
    export_policy(policy, tmp_path / "base", tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
    torch.testing.assert_close(
        policy(*inputs, 1.0, with_entropy=True), naive_logprobs(model, inputs, 1.0), rtol=0, atol=1e-5
    )


def test_weights_under_names_that_the_engine_does_not_know_are_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    without_prefix = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(without_prefix, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"load it with transformers and save it again"):
        load_policy(tiny_run(str(tmp_path)), CPU, None)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model folder .*nowhere has no config\.json, set model\.path"):
        load_policy(tiny_run(str(tmp_path / "nowhere")), CPU, None)


def test_a_folder_without_some_weights_is_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights .*model\.norm\.weight"):
        load_policy(tiny_run(str(tmp_path)), CPU, None)


def test_soft_capped_logits_are_refused(tmp_path: Path) -> None:
    write_tiny_model(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        load_policy(tiny_run(str(tmp_path)), CPU, None)


def _one_step(config: Config, mesh: DeviceMesh | None, share: Packed, out: Path) -> dict[str, Tensor]:
    """The weights after two SGD steps of both networks on `share`; exports the policy as well."""
    policy, critic = load_policy(config, CPU, mesh), load_critic(config, CPU, mesh)
    for _ in range(2):
        with torch.no_grad():  # scoring before training must not leave gathered copies behind
            policy(*share, 1.0)
        assert all(isinstance(p, DTensor) is (mesh is not None) for p in policy.parameters())
        logprobs, entropy = policy(*share, 0.9, with_entropy=True)
        values = critic(*share)
        (logprobs.sum() + 0.1 * entropy.sum() + (values - 1).square().sum()).mul(0.01).backward()
        for module in (policy, critic):
            torch.optim.SGD(module.parameters(), lr=0.1).step()
            module.zero_grad()
    export_policy(policy, Path(config.model.path), out)
    state = {name: tensor.clone() for name, tensor in policy.named_hf_parameters()}
    for name, p in critic.named_parameters():
        state["critic." + name] = p.full_tensor() if isinstance(p, DTensor) else p.detach()
    return state


CASES = [("split", 1), ("idle", 1), ("split", 2)]  # who has work, copies of the sharded model


def _compare_with_one_rank(rank: int, config: Config, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    everything = packed(LENGTHS)
    expected = _one_step(config, None, everything, folder / f"plain{rank}")
    split = [pick(everything, [0, 3, 5, 6]), pick(everything, [1, 2, 4])]
    with process_group(Device.cpu, timeout_s=60):
        for case, replicas in CASES:
            settings = dataclasses.replace(config.learner, replicas=replicas)
            mesh = make_mesh(dataclasses.replace(config, learner=settings))
            assert mesh is not None and mesh.ndim == replicas
            chosen = [[packed([]), everything], split][case == "split"]
            found = _one_step(config, mesh, chosen[rank], folder / f"{case}{replicas}")
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), (case, name)
        dist.barrier()
    if rank == 0:
        model = AutoModelForCausalLM.from_pretrained(folder / "split2")
        for name, p in model.named_parameters():
            assert torch.equal(p, found[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("is_tied", [False, True])
def test_two_ranks_equal_one_rank_also_with_nothing_to_do(
    tmp_path: Path, is_tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(
        write_tiny_model(tmp_path / "base", is_tied=is_tied), activation_checkpointing=int(is_tied), ranks=2
    )
    _set_rendezvous(monkeypatch)
    run_two_ranks(_compare_with_one_rank, config, tmp_path)


def test_bfloat16_computes_low_and_keeps_float32_master_weights_and_gradients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inputs = write_tiny_model(tmp_path), packed(LENGTHS)
    plain = load_policy(tiny_run(path), CPU, None)
    expected, _ = plain(*inputs, 1.0)
    expected.sum().backward()
    _set_rendezvous(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = dataclasses.replace(tiny_run(path), model=ModelConfig(path=path, dtype=DType.bfloat16))
    with process_group(Device.cpu, timeout_s=60):
        policy = load_policy(config, CPU, make_mesh(config))
        logprobs, _ = policy(*inputs, 1.0)
        logprobs.sum().backward()
        assert logprobs.dtype is torch.float32
        assert 1e-4 < (logprobs - expected).abs().max() < 0.5
        for (name, p), q in zip(policy.named_parameters(), plain.parameters(), strict=True):
            assert p.dtype is p.grad.dtype is torch.float32
            difference = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm()
            assert difference < 0.1, (name, difference)


def test_replicas_that_do_not_divide_the_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_rendezvous(monkeypatch)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    config = Config(learner=LearnerConfig(replicas=2), model=ModelConfig(path="", dtype=DType.bfloat16))
    with (
        process_group(Device.cpu, timeout_s=60),
        pytest.raises(ValueError, match=r"learner\.replicas=2 must"),
    ):
        make_mesh(config)


def _set_rendezvous(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(probe.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
