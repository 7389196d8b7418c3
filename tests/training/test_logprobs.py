"""Log-probabilities from slices of the head, against the model's own whole logits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.models import ARCHITECTURES, save_model
from training import logprobs
from training.logprobs import response_logprobs
from training.models import load_model

TOLERANCE = 1e-5  # relative: float32 sums in another order, 40 times its precision
CHUNK = 3 * 281  # logits at once: three positions, or two


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slices_give_the_values_and_the_gradients_of_whole_logits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(name, tmp_path)
    model = load_model(str(tmp_path))[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 270, (3, 17), generator=generator)
    mask = torch.rand(3, 16, generator=generator) > 0.4
    factors = torch.randn(3, 16, generator=generator)

    def gradient(values: Tensor) -> Tensor:
        model.zero_grad()
        (values * factors * mask).sum().backward()
        return torch.cat(
            [
                parameter.grad.flatten()
                for parameter in model.parameters()
                if parameter.grad is not None
            ]
        )

    logits = model(input_ids=ids).logits[:, :-1]
    all_logprobs = logits.double().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    expected, expected_gradient = all_logprobs.detach() * mask, gradient(all_logprobs)
    for chunk in (2**25, CHUNK):
        monkeypatch.setattr(logprobs, "CHUNK", chunk)
        actual = response_logprobs(model, ids, mask)
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE, atol=TOLERANCE)
        error = (gradient(actual) - expected_gradient).norm() / expected_gradient.norm()
        assert error < TOLERANCE
    with torch.no_grad():
        assert torch.equal(response_logprobs(model, ids, mask), actual)
    assert model(input_ids=ids).logits.shape == (3, 17, logits.shape[2])


def test_no_more_logits_at_once_than_a_slice_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("llama", tmp_path)
    model = load_model(str(tmp_path))[0]
    monkeypatch.setattr(logprobs, "CHUNK", 4 * 293)
    lengths = []
    model.lm_head.register_forward_hook(lambda *call: lengths.append(call[2].shape[1]))
    ids = torch.arange(60).view(2, 30)
    response_logprobs(model, ids, torch.ones(2, 29, dtype=torch.bool)).sum().backward()
    assert max(lengths) == 4
    assert sum(lengths) == 2 * 58  # once more for the backward pass
