"""What benchmarks/learner.py measures against: the same networks on a padded batch, and TRL's GRPO step.

Axes: B sequences, L tokens of the longest, S and T as in learner/algorithm/packing.py, V vocabulary, D width.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from learner.algorithm.advantages import group_normalised_advantages
from learner.algorithm.packing import Batch


def plain_model(folder: Path) -> PreTrainedModel:
    """The folder's causal language model as transformers loads it, its attention through SDPA."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()


class PaddedPolicy(nn.Module):
    """Takes the place of learner.networks.model.Policy: pads to the longest, makes the logits of every position."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids_S: Tensor,
        cu_seqlens_B1: Tensor,
        prompt_lengths_B: Tensor,
        temperature: float,
        with_entropy: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(logprobs_T, entropy_T) as of learner.networks.model.Policy."""
        token_ids_BL, mask_BL = _pad(token_ids_S, cu_seqlens_B1, self.model.device)
        logits_BLV = self.model(input_ids=token_ids_BL, attention_mask=mask_BL, use_cache=False).logits[:, :-1]
        logp_BLV = F.log_softmax(logits_BLV / temperature, -1)
        logprobs_BL = logp_BLV.gather(-1, token_ids_BL[:, 1:, None]).squeeze(-1)
        chosen_BL = _predicts_response(cu_seqlens_B1, prompt_lengths_B).to(logits_BLV.device)
        if not with_entropy:
            return logprobs_BL[chosen_BL], None
        entropy_BL = -(logp_BLV.exp() * logp_BLV).sum(-1)
        return logprobs_BL[chosen_BL], entropy_BL[chosen_BL]


class PaddedCritic(nn.Module):
    """Takes learner.networks.model.Critic's place; `head` is copied from it."""

    def __init__(self, backbone: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(head.in_features, 1, bias=False)
        self.head.load_state_dict(head.state_dict())

    def forward(self, token_ids_S: Tensor, cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        """values_T as of learner.networks.model.Critic."""
        token_ids_BL, mask_BL = _pad(token_ids_S, cu_seqlens_B1, self.backbone.device)
        output = self.backbone(input_ids=token_ids_BL, attention_mask=mask_BL, use_cache=False)
        values_BL = self.head(output.last_hidden_state).squeeze(-1)[:, :-1]
        return values_BL[_predicts_response(cu_seqlens_B1, prompt_lengths_B).to(values_BL.device)]


def _pad(token_ids_S: Tensor, cu_seqlens_B1: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), both int64 (B, L) on `device`, padded on the right."""
    lengths_B = cu_seqlens_B1.diff()
    token_ids_BL = pad_sequence(token_ids_S.split(lengths_B.tolist()), batch_first=True)
    mask_BL = torch.arange(token_ids_BL.shape[1]) < lengths_B[:, None]
    return token_ids_BL.to(device), mask_BL.long().to(device)


def _predicts_response(cu_seqlens_B1: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """bool (B, L - 1): whether the position predicts a response token."""
    lengths_B = cu_seqlens_B1.diff()
    place_L = torch.arange(int(lengths_B.max()) - 1)
    return (place_L >= prompt_lengths_B[:, None] - 1) & (place_L < lengths_B[:, None] - 1)


def trl_update(folder: Path, batch: Batch, rows: int, learning_rate: float) -> Callable[[], float]:
    """One update of TRL's GRPOTrainer on `batch`, `rows` completions at a time; the call returns the gradient norm.

    What is timed is TRL's own compute_loss, backward, clipping and optimizer, as its training loop calls them
    after generation. Settings are TRL's defaults except where they would do more work than we do (gradient
    checkpointing is on by default) or other work (clip edges, no prompt templates).

    Raises ImportError when TRL is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version of vLLM, which is not used here
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

    num_micros = batch.num_sequences // rows
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num_micros,
        num_generations=8,
        max_completion_length=int(batch.response_lengths_B.max()),
        gradient_checkpointing=False,
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=learning_rate,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=plain_model(folder),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "1"}] * batch.num_sequences),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.current_gradient_accumulation_steps = num_micros
    optimizer, model = trainer.create_optimizer(), trainer.model.train()
    inputs = _trl_inputs(batch)
    micros = [
        {name: x if x.dim() == 0 else x[start : start + rows] for name, x in inputs.items()}
        for start in range(0, batch.num_sequences, rows)
    ]

    def update() -> float:
        for micro in micros:
            trainer.accelerator.backward(trainer.compute_loss(model, micro))
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(norm)

    return update


def _trl_inputs(batch: Batch) -> dict[str, Tensor]:
    """The batch in the form that GRPOTrainer's generation leaves behind: prompts padded left, completions right."""
    prompts, completions = [], []
    for sequence, prompt_length in zip(
        batch.token_ids_S.split(batch.lengths_B.tolist()), batch.prompt_lengths_B.tolist(), strict=True
    ):
        prompts.append(sequence[:prompt_length])
        completions.append(sequence[prompt_length:])
    prompt_ids = pad_sequence(prompts, batch_first=True, padding_side="left")
    completion_ids = pad_sequence(completions, batch_first=True)
    places, widths = torch.arange(prompt_ids.shape[1]), batch.prompt_lengths_B[:, None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": (places >= prompt_ids.shape[1] - widths).long(),
        "completion_ids": completion_ids,
        "completion_mask": (torch.arange(completion_ids.shape[1]) < batch.response_lengths_B[:, None]).long(),
        "advantages": group_normalised_advantages(batch.rewards_B, batch.group_index_B),
        "num_items_in_batch": torch.tensor(float(batch.num_response_tokens)),
    }
