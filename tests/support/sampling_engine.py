"""The learner's own network in the place of an actor's vLLM engine, and sampled from: a run learns with it."""

from collections.abc import Sequence

import numpy as np
import torch

from common.types import FinishReason, Int32Array
from learner.algorithm.packing import boundaries
from learner.networks.reading import read
from tests.support.network_engine import NetworkEngine, Response

TOKENS_A_TURN = 16  # of each response


class SamplingEngine(NetworkEngine):
    """At temperature 1, without a cache; a response ends with the model's end of sequence or at its limit."""

    def decode(self, token_ids: Int32Array) -> str:
        text: str = self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=True)
        return text

    @torch.no_grad()
    def _draw(self, responses: list[Response]) -> None:
        for _ in range(TOKENS_A_TURN):
            responses = [response for response in responses if not response.has_ended.done()]
            if not responses:
                return
            logprobs = self._next_logprobs(responses)
            probabilities = zip(responses, logprobs.exp(), strict=True)
            token_ids = torch.cat([torch.multinomial(p_V, 1, generator=r.generator) for r, p_V in probabilities])
            drawn = logprobs.gather(1, token_ids[:, None])[:, 0]
            for response, token_id, logprob in zip(responses, token_ids.tolist(), drawn.tolist(), strict=True):
                self._append(response, token_id, logprob)

    def _append(self, response: Response, token_id: int, logprob: float) -> None:
        response.note_version(self.version)
        response.token_ids.append(token_id)
        response.logprobs.append(logprob)
        is_over = token_id == self._tokenizer.eos_token_id
        if is_over or len(response.token_ids) == response.limit:
            response.reason = FinishReason.STOP if is_over else FinishReason.LENGTH
            response.has_ended.set_result(None)

    def _next_logprobs(self, responses: Sequence[Response]) -> torch.Tensor:
        """[responses, vocabulary]; the token behind each sequence is there to ask for the one in its place."""
        whole = [np.concatenate([r.before, np.array([*r.token_ids, 0], np.int32)]) for r in responses]
        lengths = torch.tensor([len(sequence) for sequence in whole])
        model = self._transfer.policy.model
        tokens = torch.from_numpy(np.concatenate(whole)).long()
        hidden = read(model.base_model, tokens, boundaries(lengths), lengths - 1).hidden_UD
        head = model.get_output_embeddings()
        return torch.nn.functional.linear(hidden.float(), head.weight.float()).log_softmax(-1)
