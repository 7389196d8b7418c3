"""Attention that is to be differentiated on a CPU: in float32, to the same values."""

import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.training.models import save_model
from training import models


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_model("llama", directory)
    return str(directory)


@pytest.fixture
def dtypes(monkeypatch):
    """Of the queries that PyTorch's attention gets."""
    found = []

    def recorded(module, query, *args, **options):
        found.append(query.dtype)
        assert not torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled()
        return sdpa_attention_forward(module, query, *args, **options)

    monkeypatch.setattr(models, "sdpa_attention_forward", recorded)
    return found


def gradients(model, mask):
    ids = torch.arange(24).view(2, 12) * 7 % 251
    logits = model(ids, attention_mask=mask).logits.float()
    (logits.log_softmax(-1)[..., 5] * mask).sum().backward()
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


@pytest.mark.parametrize("padded", [False, True])
def test_its_gradients_are_those_of_float32(saved, dtypes, padded):
    mask = torch.ones(2, 12, dtype=torch.long)
    if padded:
        mask[0, :5] = 0
    exact = gradients(models.load_model(saved, attention="eager")[0], mask)
    assert dtypes == []
    model = models.load_model(saved)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, mask)
    assert set(dtypes) == {torch.float32}
    # bfloat16 has 8 bits of mantissa, in all that is around.
    assert torch.cosine_similarity(found, exact, dim=0) > 0.99
    assert found.norm() / exact.norm() == pytest.approx(1, abs=0.05)


@torch.no_grad()
def test_without_gradients_nothing_changes(saved, dtypes):
    model = models.load_model(saved, dtype=torch.bfloat16)[0]
    model(torch.arange(24).view(2, 12))
    assert set(dtypes) == {torch.bfloat16}
