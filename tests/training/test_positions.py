"""Positions of given responses: the frozen LLM's nucleus at each of them, and tokens outside of it."""

from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from proxy.positions import Positions, nucleus_of
from tests.training.models import PROMPTS, chat, frozen_of, save_model
from training import part_cache
from training.conversations import Conversations
from training.model_inputs import HeadInput
from training.policy import Decoding, Policy, default_config
from training.positions import Cache, Response, read
from training.rewards import Frozen
from training.rollout import generate

DECODING = Decoding(top_k=6, top_p=0.9, max_new_tokens=12)
NUCLEUS = {"temperature": 1.0, "top_k": 6, "top_p": 0.9, "max_candidates": 6}


@pytest.fixture(scope="module", params=["llama", "gemma2", "gpt2"])
def frozen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Frozen:
    directory = tmp_path_factory.mktemp("model")
    save_model(request.param, directory)
    return frozen_of(directory)


def sampled_responses(frozen: Frozen) -> list[Response]:
    """The LLM's own responses, three to each prompt."""
    chats = Conversations(frozen.tokenizer)
    prompts = [chats.prompt_ids(chat(text)) for text in PROMPTS for _ in range(3)]
    rollout = generate(
        Policy(frozen.model), prompts, DECODING, end_ids=frozen.end_ids, seeds=count()
    )
    return [Response(*pair) for pair in zip(prompts, rollout.responses, strict=True)]


@torch.inference_mode()
def test_positions_are_those_of_a_plain_forward(frozen: Frozen) -> None:
    responses, config = sampled_responses(frozen), default_config(frozen.model, **NUCLEUS)
    actual = read(responses, config, model=frozen.model, max_tokens=64)
    assert actual.outside.tolist() == [0] * len(responses)
    for i, (prompt, response) in enumerate(responses):
        with HeadInput(frozen.model) as head:
            logits = frozen.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            hidden = head.states[0, len(prompt) - 1 : -1]
        candidates = nucleus_of(logits, config)
        has_choice = (candidates.logprobs > -torch.inf).sum(-1) > 1
        (single, owners) = actual.of(torch.tensor([i]))
        assert owners.tolist() == [0] * int(has_choice.sum())
        assert single.tokens.tolist() == [len(response)]
        # Batches of other lengths round differently: float32, of numbers up to 20.
        torch.testing.assert_close(single.hidden, hidden[has_choice], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            single.logprobs, candidates.logprobs[has_choice], rtol=1e-3, atol=1e-3
        )
        chosen_ids = single.token_ids.gather(-1, single.slots[:, None]).squeeze(-1)
        assert chosen_ids.tolist() == torch.tensor(response)[has_choice].tolist()


def test_a_token_that_the_llm_would_not_say_is_outside(frozen: Frozen) -> None:
    (prompt, response), *_ = sampled_responses(frozen)
    config = default_config(frozen.model, **NUCLEUS | {"max_candidates": 2, "top_k": 2})
    with torch.no_grad():
        unlikely_id = int(frozen.model(torch.tensor([prompt])).logits[0, -1].argmin())
    actual = read(
        [Response(prompt, [unlikely_id, *response])], config, model=frozen.model, max_tokens=64
    )
    assert actual.outside.item() >= 1
    assert actual.share_outside == actual.outside.item() / (1 + len(response))


def test_what_was_read_is_not_read_again(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses, config = sampled_responses(frozen), default_config(frozen.model, **NUCLEUS)
    monkeypatch.setattr(part_cache, "_PART", 4)  # three files
    cache = Cache(tmp_path, frozen.base, "float32", Accelerator(cpu=True))
    reader = partial(read, model=frozen.model, max_tokens=64)
    first_read = cache.read(responses, config, reader)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:100])
    files[2].unlink()
    num_read = []

    def counted(responses: Sequence[Response], *args: Any) -> Positions:
        num_read.append(len(responses))
        return reader(responses, *args)

    second_read = cache.read(responses, config, counted)
    assert num_read == [4, 1]
    for expected, actual in zip(first_read, second_read, strict=True):
        torch.testing.assert_close(expected, actual, rtol=0, atol=0)
    cache.read([*responses, *responses[:2]], config, counted)  # another round appends
    assert num_read[2:] == [3]
    narrower = config.model_copy(update={"top_p": 0.5})
    assert len(cache.read(responses, narrower, reader).slots) < len(first_read.slots)
    assert len(list(tmp_path.iterdir())) == 3 + 1 + 3
