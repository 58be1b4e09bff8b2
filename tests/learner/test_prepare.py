"""prepare: a few steps give the same bytes twice and a folder that loads; the committed folders are usable."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer

from common.config import ConfigError, TaskConfig
from common.tasks import load_task
from learner import prepare
from learner.prepare import MODELS, RECIPES, Recipe, build_base_model, build_tokenizer, measure_accuracy

# Greedy decoding or sampling can differ between machines in the last bit, and 1024 samples have a deviation of 0.016.
EXPECTED_ACCURACY = {"chain_sum": (0.38, 0.52), "number_walk": (0.30, 0.44), "contrary_walk": (0.15, 0.28)}
NAMES = sorted(RECIPES)


def _tiny(name: str) -> Recipe:
    """The recipe of `name`, shortened to three steps of four demonstrations in either phase."""
    recipe = RECIPES[name]
    return replace(recipe, phases=tuple(replace(p, num_steps=3, batch_size=4) for p in recipe.phases))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(name: str, tmp_path: Path) -> None:
    heldout = list(load_task(TaskConfig(name=RECIPES[name].task, num_train=1, num_heldout=4)).heldout)
    for folder, seed in (("first", 5), ("again", 5), ("other", 6)):
        torch.manual_seed(len(folder))  # the global generator must not matter
        build_base_model(_tiny(name), heldout, tmp_path / folder, seed)
    first, again, other = (_files(tmp_path / folder) for folder in ("first", "again", "other"))
    assert first == again
    assert first["model.safetensors"] != other["model.safetensors"]


def test_a_prepared_folder_holds_a_float32_model_with_its_tokenizer(tmp_path: Path) -> None:
    heldout = list(load_task(TaskConfig(name="chain_sum", num_train=1, num_heldout=2)).heldout)
    build_base_model(_tiny("chain_sum"), heldout, tmp_path / "model", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert isinstance(model, Qwen2ForCausalLM)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_preparing_leaves_threads_and_the_global_generator_as_they_were(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    heldout = list(load_task(TaskConfig(name="number_walk", num_train=1, num_heldout=2)).heldout)
    build_base_model(_tiny("number_walk"), heldout, tmp_path / "model", seed=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_heldout_prompts_are_not_among_the_demonstrations(name: str) -> None:
    phase = RECIPES[name].phases[0]
    common = {phase.demonstrate(Random(seed))[0] for seed in range(50)}
    batches = prepare._batches(phase, frozenset(common), Random(3))
    prompts = {prompt for batch in islice(batches, 200) for prompt, _ in batch}
    assert prompts.isdisjoint(common)


def test_targets_cover_the_response_and_the_end_and_nothing_else() -> None:
    tokenizer = build_tokenizer(RECIPES["number_walk"].characters)
    token_ids_BL, targets_BL = prepare._collate([("47>83=", "+956#"), ("01>02=", "+102+1#")], tokenizer)
    for row, response in enumerate(("+956#", "+102+1#")):
        is_target_L = targets_BL[row] != -100
        assert tokenizer.decode(targets_BL[row][is_target_L]) == response + "<eos>"
        # the target of a position is the token after it
        positions = torch.nonzero(is_target_L).flatten()
        assert torch.equal(token_ids_BL[row, positions + 1], targets_BL[row, positions])


def test_a_recipe_that_starts_from_a_shipped_model_goes_on_from_its_weights(tmp_path: Path) -> None:
    recipe = replace(RECIPES["contrary_walk"], phases=())
    build_base_model(recipe, list(load_task(TaskConfig(name=recipe.task, num_heldout=2)).heldout), tmp_path, seed=0)
    assert _files(tmp_path) == _files(MODELS / "number_walk")


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(ConfigError, match="'file'; prepare knows: chain_sum, number_walk, contrary_walk"):
        prepare.prepare("file", None, 0)


# --- the committed folders ---------------------------------------------------------------------------------


def _load(name: str) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    return (
        AutoModelForCausalLM.from_pretrained(MODELS / name),
        AutoTokenizer.from_pretrained(MODELS / name),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_tokenizer_has_one_token_per_character_and_both_specials(name: str) -> None:
    model, tokenizer = _load(name)
    characters = RECIPES[name].characters
    token_ids = tokenizer.encode(characters)
    assert len(set(token_ids)) == len(token_ids) == len(characters)
    assert tokenizer.decode(token_ids) == characters
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "<eos>")
    assert model.config.vocab_size == len(tokenizer) == len(characters) + 2
    assert tokenizer.decode([*token_ids, tokenizer.eos_token_id], skip_special_tokens=True) == characters


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_folder_asks_for_no_sampling_settings(name: str) -> None:
    model, tokenizer = _load(name)
    settings = model.generation_config.to_diff_dict()
    assert not settings.keys() & {"top_k", "top_p", "temperature", "min_p", "do_sample"}
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_committed_model_has_the_documented_accuracy(name: str) -> None:
    model, tokenizer = _load(name)
    heldout = list(load_task(TaskConfig(name=RECIPES[name].task, num_train=1)).heldout)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        accuracy, _ = measure_accuracy(model, tokenizer, RECIPES[name], heldout)
    low, high = EXPECTED_ACCURACY[name]
    assert low <= accuracy <= high
