"""Log-probs from bfloat16 factors against float64; the exactness of tiles and chunks is in test_model.py."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from learner.networks.logprobs import _product, token_logprobs

TOKENS, WIDTH, VOCAB = 600, 256, 5000


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def outputs_and_gradients(
    of: Callable[[Tensor, Tensor, Tensor], Tensor], dtype: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    """[log-probs, gradient of the hidden states, of the weights], float64; logits have standard deviation 4."""
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
    weight_VD = (torch.randn(VOCAB, WIDTH, generator=generator) / 4).bfloat16()
    targets_T = torch.randint(VOCAB, (TOKENS,), generator=generator)
    slopes_T = torch.randn(TOKENS, generator=generator).double()
    h, w = (x.to(device, dtype).requires_grad_() for x in (hidden_TD, weight_VD))
    logprobs_T = of(h, w, targets_T.to(device))
    (logprobs_T.double() * slopes_T.to(device)).sum().backward()
    assert h.grad is not None and w.grad is not None
    return [x.detach().double().cpu() for x in (logprobs_T, h.grad, w.grad)]


def tiled(h: Tensor, w: Tensor, targets_T: Tensor) -> Tensor:
    return token_logprobs(h, w, targets_T, temperature=1.0, chunk_tokens=256)[0]


def exact(h: Tensor, w: Tensor, targets_T: Tensor) -> Tensor:
    return torch.log_softmax(h @ w.T, -1)[torch.arange(len(targets_T)), targets_T]


@pytest.mark.parametrize("device", DEVICES)
def test_log_probs_from_bfloat16_factors_are_not_rounded_to_bfloat16(device: str) -> None:
    """Measured: mean 9e-7, max 6e-6 nats; with logits that were rounded first, mean 0.009 and max 0.056."""
    expected = outputs_and_gradients(exact, torch.float64)
    found = outputs_and_gradients(tiled, torch.bfloat16, device)
    error_T = (found[0] - expected[0]).abs()
    assert error_T.mean() < 5e-6 and error_T.max() < 5e-5


@pytest.mark.parametrize("device", DEVICES)
def test_their_gradients_are_rounded_once(device: str) -> None:
    """Measured: 0.0023 of the norm, what one rounding to bfloat16 costs; 0.0062 with rounded logits and products."""
    expected = outputs_and_gradients(exact, torch.float64)
    found = outputs_and_gradients(tiled, torch.bfloat16, device)
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a - b).norm() < 0.0035 * b.norm()


def test_float32_factors_give_float32_log_probs_and_gradients() -> None:
    expected = outputs_and_gradients(exact, torch.float64)
    for a, b in zip(outputs_and_gradients(tiled, torch.float32), expected, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_on_cuda_the_product_of_bfloat16_leaves_as_float32() -> None:
    """On tensors without content: there may be no GPU here."""
    with FakeTensorMode():
        hidden = torch.empty(10, 8, device="cuda", dtype=torch.bfloat16)
        weight = torch.empty(40, 8, device="cuda", dtype=torch.bfloat16)
        gradient = torch.empty(10, 40, device="cuda", dtype=torch.bfloat16)
        for a, b in ((hidden, weight.T), (gradient, weight), (gradient.T, hidden)):
            product = _product(a, b)
            assert (product.dtype, product.shape) == (torch.float32, (len(a), b.shape[1]))
