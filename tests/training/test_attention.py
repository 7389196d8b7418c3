"""Attention that is to be differentiated on a CPU: in float32, to the same values."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.training.models import save_model
from training import models


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_model("llama", directory)
    return str(directory)


@pytest.fixture
def dtypes(monkeypatch):
    """The dtypes of the queries that PyTorch's attention gets."""
    recorded_dtypes = []

    def recorded(module, query, *args, **options):
        recorded_dtypes.append(query.dtype)
        assert not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()
        return sdpa_attention_forward(module, query, *args, **options)

    monkeypatch.setattr(models, "sdpa_attention_forward", recorded)
    return recorded_dtypes


def gradients(model, mask):
    ids = torch.arange(24).view(2, 12) * 7 % 251
    logits = model(ids, attention_mask=mask).logits.float()
    (logits.log_softmax(-1)[..., 5] * mask).sum().backward()
    return torch.cat([parameter.grad.float().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("padded", [False, True])
def test_its_gradients_are_those_of_float32(model_dir, dtypes, padded):
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    exact = gradients(models.load_model(model_dir, attention="eager")[0], mask)
    assert dtypes == []
    model = models.load_model(model_dir)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(model, mask)
    assert set(dtypes) == {torch.float32}
    # All other operations are in bfloat16, which has 8 bits of mantissa.
    assert torch.cosine_similarity(actual, exact, dim=0) > 0.99
    assert actual.norm() / exact.norm() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_without_gradients_nothing_changes(model_dir, dtypes):
    model = models.load_model(model_dir, dtype=torch.bfloat16)[0]
    model(torch.arange(24).view(2, 12))
    assert set(dtypes) == {torch.bfloat16}
