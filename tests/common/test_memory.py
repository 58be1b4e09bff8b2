"""The memory plan, against numbers that were worked out by hand and against what autograd holds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from common.config import (
    ActorsConfig,
    AlgorithmConfig,
    Config,
    ConfigError,
    CriticFrozen,
    CriticNetwork,
    Device,
    DType,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    Offload,
    Placement,
    StalenessConfig,
)
from common.loading import RECIPES
from common.memory import GIB, MemoryPlan, Shapes, activations, plan_memory, refuse_shortage
from common.model_shape import ModelShape, shape_of
from learner.networks import attention, lora
from learner.networks.attention import IMPLEMENTATION, Packing

QWEN = {"model_type": "qwen2", "tie_word_embeddings": True, "vocab_size": 151936, "num_key_value_heads": 2}
SIZES: dict[str, dict[str, Any]] = {
    "0.5B": QWEN | {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "intermediate_size": 4864},
    "1.5B": QWEN | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960},
    "7B": QWEN
    | {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "intermediate_size": 18944}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32B": QWEN
    | {"hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 40, "intermediate_size": 27648}
    | {"num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}


def config(**learner: Any) -> Config:
    return Config(
        device=Device.cuda,
        model=ModelConfig(path="unread", dtype=DType.bfloat16, max_model_len=2048),
        learner=LearnerConfig(**{"tokens_per_micro_batch": 8192} | learner),
        actors=ActorsConfig(placement=Placement.shared),
    )


def shapes(size: str, has_critic: bool = True) -> Shapes:
    shape = shape_of(SIZES[size])
    return Shapes(policy=shape, critic=shape if has_critic else None)


def plan(settings: Config, size: str, gpu_gib: int, has_critic: bool = True) -> MemoryPlan:
    return plan_memory(settings, shapes(size, has_critic), gpu_gib * GIB)


@pytest.mark.parametrize(
    ("size", "parameters"), [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("7B", 7_615_616_512)]
)
def test_parameters_are_those_of_the_published_models(size: str, parameters: int) -> None:
    assert shape_of(SIZES[size]).parameters == parameters


@pytest.mark.parametrize(
    "settings",
    [
        Qwen2Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        Qwen3Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1),
    ],
    ids=["qwen2", "qwen3"],
)
def test_parameters_are_those_that_transformers_makes(settings: Qwen2Config | Qwen3Config) -> None:
    settings.intermediate_size = 48
    model_class = Qwen2ForCausalLM if isinstance(settings, Qwen2Config) else Qwen3ForCausalLM
    with torch.device("meta"):
        model = model_class(settings)
    assert shape_of(settings.to_dict()).parameters == sum(p.numel() for p in model.parameters())


def test_a_mixture_counts_all_experts_and_computes_with_the_active_ones() -> None:
    mixture = shape_of(
        SIZES["0.5B"]
        | {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 100}
    )
    dense = shape_of(SIZES["0.5B"] | {"model_type": "qwen3", "intermediate_size": 100})
    assert mixture.layer - dense.layer == 7 * 3 * 896 * 100 + 8 * 896
    settings = config()
    assert activations(settings, mixture)[0] - activations(settings, dense)[0] == 8192 * 24 * 4 * 2 * 100


def held_per_token(model_class: type[PreTrainedModel], settings: Any, dtype: torch.dtype) -> float:
    """Bytes that autograd keeps of each decoder layer after a forward pass, per token, parameters left out."""
    num_tokens, totals = 256, []
    for layers in (1, 3):
        settings.num_hidden_layers = layers
        settings.layer_types = ["full_attention"] * layers
        model = model_class._from_config(settings, attn_implementation=IMPLEMENTATION, dtype=dtype)
        owned = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        kept: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.append(tensor)
            return tensor

        packing = Packing.from_lengths([num_tokens], torch.device("cpu"))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            token_ids = torch.zeros(1, num_tokens, dtype=torch.int64)
            model.base_model(
                input_ids=token_ids, position_ids=packing.position_ids_S[None], use_cache=False, packing=packing
            )
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        totals.append(sum(size for place, size in storages.items() if place not in owned))
    return (totals[1] - totals[0]) / 2 / num_tokens


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float32])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_activations_are_what_autograd_holds(family: str, dtype: DType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is of GPUs, where attention has the compute type."""
    monkeypatch.setattr(attention, "BATCHED_DTYPE", getattr(torch, dtype))
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    settings = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[family](**sizes, num_key_value_heads=2, head_dim=32)
    model_class = {"qwen2": Qwen2ForCausalLM, "qwen3": Qwen3ForCausalLM}[family]
    held = held_per_token(model_class, settings, getattr(torch, dtype))
    shape = replace(shape_of(settings.to_dict()), layers=1)
    run = replace(config(tokens_per_micro_batch=2048), model=ModelConfig(path="unread", dtype=dtype))
    planned = (activations(run, replace(shape, layers=2))[0] - activations(run, shape)[0]) / 2048
    assert planned == pytest.approx(held, rel=0.01)  # the plan leaves one number per head and token out


def test_checkpointing_keeps_the_layers_inputs_and_computes_one_again() -> None:
    shape = shape_of(SIZES["7B"])
    kept, working = activations(config(activation_checkpointing=1), shape)
    layer = 2 * 3584 * (4 + 2 * 2) + 2 * (2 * 3584 + 2 * 512 + 4 * 18944)
    backward = 3 * 2 * 18944 + 2 * 4 * 3584
    head = (4 + 4 * 2) * 3584
    assert kept == 8192 * (28 * 2 * 3584 + head)
    assert working == 8192 * (layer + backward)
    assert activations(config(), shape) == (8192 * (28 * layer + head), 8192 * backward)


def test_every_second_layer_is_half_of_the_way() -> None:
    shape = shape_of(SIZES["7B"])
    none, half, every = (activations(config(activation_checkpointing=n), shape)[0] for n in (0, 2, 1))
    assert half * 2 == none + every


def test_what_rests_on_the_host_is_not_on_the_gpu() -> None:
    whole, moments, everything = (plan(config(offload=what), "1.5B", 80) for what in Offload)
    assert whole.learner.keys() - moments.learner.keys() == {"optimizer"}
    assert moments.learner.keys() - everything.learner.keys() == {"parameters"} and everything.learner["gradients"] == 0


def test_a_learner_alone_with_half_a_billion_parameters() -> None:
    """Worked out by hand: 0.494e9 parameters and a critic of as many, float32 weights and two moments of each."""
    parts = plan(config(activation_checkpointing=1), "0.5B", 24).learner
    networks = 2 * 494_032_768 + 896
    assert parts["parameters"] == 4 * networks
    assert parts["optimizer"] == 8 * networks
    assert parts["gradients"] == 4 * 494_032_768
    assert parts["logits and their gradients"] == 3 * 4 * 1024 * 32768 + 6 * 151936 * 896
    assert sum(parts.values()) / GIB == pytest.approx(15.5, abs=0.1)


def test_shards_are_shared_out_and_replicas_are_not() -> None:
    whole, four = plan(config(), "7B", 80), plan(config(ranks=4), "7B", 80)
    two_copies = plan(config(ranks=4, replicas=2), "7B", 80)
    assert four.learner["optimizer"] * 4 == whole.learner["optimizer"]
    assert two_copies.learner["optimizer"] * 2 == whole.learner["optimizer"]
    assert four.learner["activations"] == whole.learner["activations"]


def test_without_a_critic_and_with_a_reference() -> None:
    alone = plan(config(), "1.5B", 80, has_critic=False).learner
    assert alone["parameters"] == 4 * 1_543_714_304
    with_reference = replace(config(), algorithm=AlgorithmConfig(kl_weight=0.1))
    assert plan(with_reference, "1.5B", 80).learner["reference"] == 4 * 1_543_714_304


def test_adapters_are_trained_and_models_are_frozen() -> None:
    """Worked out by hand: rank 8 on 24 layers of 4 D + 2 (Q + K) + 3 (D + I) = 22,912 inputs and outputs."""
    adapters = 8 * 24 * 22_912
    run = replace(config(), lora=LoraConfig(rank=8), algorithm=AlgorithmConfig(kl_weight=0.1))
    separate = plan(run, "0.5B", 24).learner
    shared = plan(replace(run, model=replace(run.model, critic=CriticNetwork.shared_backbone)), "0.5B", 24).learner
    assert separate["frozen parameters"] == 2 * shared["frozen parameters"] == 2 * 2 * 494_032_768
    for parts in (separate, shared):
        assert parts["parameters"] == 4 * (2 * adapters + 896) and parts["optimizer"] == 2 * parts["parameters"]
        assert parts["gradients"] == 4 * adapters and "reference" not in parts  # which is the frozen model
        assert parts["logits and their gradients"] == 3 * 4 * 1024 * 32768
    alone = plan(run, "0.5B", 24, has_critic=False).learner
    assert alone["frozen parameters"] == 2 * 494_032_768 and alone["parameters"] == 4 * adapters
    on_host = plan(replace(run, learner=config(offload=Offload.all).learner), "0.5B", 24).learner
    assert on_host.keys().isdisjoint({"frozen parameters", "parameters", "optimizer"})


def test_frozen_attention_has_neither_gradients_nor_moments() -> None:
    """Worked out by hand: 24 layers of D (2 Q + 2 K) + Q + 2 K, with D = Q = 896 and K = 128."""
    attention = 24 * (896 * (2 * 896 + 2 * 128) + 896 + 2 * 128)
    networks = 2 * 494_032_768 + 896
    run = replace(config(), model=replace(config().model, critic_frozen=CriticFrozen.attention))
    parts = plan(run, "0.5B", 24).learner
    assert parts["parameters"] == 4 * networks and parts["optimizer"] == 8 * (networks - attention)
    assert parts["gradients"] == 4 * 494_032_768  # the policy's


def test_two_critics_take_twice_the_room_of_one() -> None:
    critic = 494_032_768 + 896
    run = replace(config(), model=replace(config().model, num_critics=2))
    parts = plan(run, "0.5B", 24).learner
    assert parts["parameters"] == 4 * (494_032_768 + 2 * critic) and parts["optimizer"] == 2 * parts["parameters"]
    assert parts["gradients"] == 4 * 2 * 494_032_768  # of both, which one optimizer steps
    assert parts["activations"] == plan(config(), "0.5B", 24).learner["activations"]  # of one after the other


def test_an_adapter_has_the_parameters_that_peft_makes() -> None:
    settings = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2
    )
    settings.num_hidden_layers, run = 2, LoraConfig(rank=3)
    root = lora.freeze(Qwen2ForCausalLM(settings), torch.float32)
    lora.add_adapter(root, lora.POLICY, run)
    made = sum(p.numel() for p in root.parameters() if p.requires_grad)
    assert made == 2 * 3 * shape_of(settings.to_dict()).linear_widths


def test_the_engine_gets_what_the_learner_leaves_and_no_more_than_it_can_use() -> None:
    run = config(activation_checkpointing=1)
    small, large = plan(run, "1.5B", 54), plan(run, "1.5B", 141)
    per_token = 2 * 28 * 256 * 2  # keys and values, layers, key-value width, bytes
    assert small.kv_per_token == per_token and small.kv_least == 2048 * per_token
    assert large.kv_cache == 16 * 8 * 2048 * per_token  # every sequence of 16 groups of 8 at full length
    assert small.kv_cache < large.kv_cache
    total = sum(small.learner.values()) + sum(small.engine.values()) + small.kv_cache
    assert total == pytest.approx(small.usable, abs=1)
    # the fraction is of the whole GPU; the context is beside it
    assert small.gpu_memory_utilization * small.gpu == pytest.approx(small.engine_room - small.engine["context"])


def test_engines_on_one_gpu_share_the_rest() -> None:
    one, run = plan(config(), "0.5B", 28), config()
    three = plan(replace(run, actors=replace(run.actors, count=3)), "0.5B", 40)
    assert (one.engines_per_gpu, three.engines_per_gpu) == (1, 3)
    left = three.usable - sum(three.learner.values())
    assert 3 * three.engine_room <= left


def test_a_sleeping_engine_leaves_its_memory_to_the_training() -> None:
    run = config(activation_checkpointing=1)
    slept = replace(
        run,
        actors=replace(run.actors, sleep_while_training=True),
        staleness=StalenessConfig(max_staleness=0),
    )
    awake, asleep = plan(run, "1.5B", 48), plan(slept, "1.5B", 48)
    assert awake.shortage > 0 and asleep.shortage == 0
    assert asleep.engine_room > awake.engine_room


def test_separate_gpus_are_judged_alone() -> None:
    run = config(activation_checkpointing=1)
    apart = replace(run, actors=replace(run.actors, placement=Placement.separate, gpu_memory_utilization=None))
    alone = plan(apart, "1.5B", 48)
    assert alone.shortage == 0 and alone.gpu_memory_utilization == pytest.approx(0.9)
    assert plan(apart, "7B", 80).shortage == sum(plan(apart, "7B", 80).learner.values()) - int(0.95 * 80 * GIB)


@pytest.mark.parametrize("utilization", [0.02, 0.6])
def test_a_fraction_that_is_set_is_refused_when_it_is_too_small_or_leaves_too_little(utilization: float) -> None:
    run = config(activation_checkpointing=1)
    run = replace(run, actors=replace(run.actors, gpu_memory_utilization=utilization))
    with pytest.raises(ConfigError, match=r"actors\.gpu_memory_utilization=null"):
        refuse_shortage(run, shapes("0.5B"), 24 * GIB)


def test_a_shortage_is_one_sentence_with_the_numbers_and_what_helps_most() -> None:
    with pytest.raises(ConfigError) as caught:
        refuse_shortage(config(), shapes("1.5B"), 24 * GIB)
    sentence = str(caught.value)
    assert sentence.startswith(
        "48.0 GiB too little memory on one shared GPU of 24.0 GiB, of which 22.8 GiB are planned"
    )
    assert "the learner needs 65.5 GiB (parameters 11.5, optimizer 23.0," in sentence
    assert "an engine needs 5.3 GiB (weights 2.9," in sentence
    assert sentence.endswith(
        "set learner.offload=all (-40.3 GiB) or learner.offload=optimizer (-23.0 GiB) or "
        "learner.activation_checkpointing=1 (-20.9 GiB)"
    )


def test_the_recipe_for_one_gpu_fits_on_24_gib() -> None:
    recipe = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(RECIPES / "one_gpu.yaml"))
    run = OmegaConf.to_object(recipe)
    assert isinstance(run, Config) and run.is_shared
    fits = refuse_shortage(run, shapes("0.5B"), 24 * GIB)
    assert fits.kv_cache == 1024 * fits.kv_per_token * 256  # all sequences of a step at once, at full length


@pytest.mark.parametrize(("name", "on_paper_gib"), [("7b", 48.0), ("32b", 66.0)])
def test_the_recipes_for_large_models_fit_on_80_gib_with_room_to_spare(name: str, on_paper_gib: float) -> None:
    """Both roles on GPUs of their own; docs/gpu.md has the same by a coarser formula."""
    recipe = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(RECIPES / f"vapo_qwen2.5_{name}.yaml"))
    run = OmegaConf.to_object(recipe)
    assert isinstance(run, Config)
    found = plan(replace(run, actors=replace(run.actors, placement=Placement.separate)), name.upper(), 80)
    taken_gib = sum(found.learner.values()) / GIB
    assert found.shortage == 0 and taken_gib == pytest.approx(on_paper_gib, rel=0.05)
    assert found.usable / GIB - taken_gib > 6.0


def test_what_fits_is_planned_and_not_refused() -> None:
    assert refuse_shortage(config(activation_checkpointing=1), shapes("0.5B"), 24 * GIB).kv_cache > 0


def test_a_shape_that_is_not_given_is_named(tmp_path: Any) -> None:
    from common.model_shape import read_shape

    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "vocab_size": 9}')
    with pytest.raises(ConfigError, match=r"does not give hidden_size in its config\.json"):
        read_shape(str(tmp_path))


def test_an_output_layer_that_is_split_off_counts() -> None:
    tied: ModelShape = shape_of(SIZES["0.5B"])
    assert shape_of(SIZES["0.5B"], tie_word_embeddings=False).parameters - tied.parameters == 151936 * 896
