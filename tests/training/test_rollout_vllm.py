"""Rollouts in vLLM: those of transformers, decision by decision, from a real engine in this process.

In float32, where rounding decides nothing here: the responses must be the same ones.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import training.rollout_vllm
from proxy.checkpoint import identify
from proxy.network import ProxyNetwork
from tests.proxy.conftest import make_llm, model_dir  # noqa: F401
from training import rollout_backends
from training.console import TrainingError
from training.machine import Machine
from training.policy import Decoding, Policy, default_config
from training.positions import Reader, Response, read
from training.rollout import Rollout, generate
from training.rollout_vllm import VLLMBackend, only_prompts_shared
from training.traces import asked

PROMPTS = [[i % 250 + 5, *range(20, 20 + i % 7)] for i in range(24)]
ENDS = {1, *range(100, 120)}  # so many that responses differ in length
DECODING = Decoding(max_new_tokens=24)


@pytest.fixture(scope="module")
def frozen(model_dir: Path) -> PreTrainedModel:  # noqa: F811
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def make_engine(
    make_llm: Callable[..., Any],  # noqa: F811  # undoes what an engine does to the process
    frozen: PreTrainedModel,
    model_dir: Path,  # noqa: F811
) -> Callable[..., VLLMBackend]:
    settings = {"max_tokens": 64, "max_requests": 16, "memory": 0.01}
    base = identify(str(model_dir))
    return lambda **overrides: VLLMBackend(frozen, model_dir, base, **settings | overrides)


@pytest.fixture(scope="module")
def engine(make_engine: Callable[..., VLLMBackend]) -> Iterator[VLLMBackend]:
    set_num_threads, dtype, threads = (
        torch.set_num_threads,
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )
    children = active_children()  # of other tests
    yield make_engine()
    assert torch.set_num_threads is set_num_threads
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (dtype, threads)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert set(active_children()) <= set(children)


def make_network(model: PreTrainedModel, seed: int, **settings: Any) -> ProxyNetwork:
    """It rejects about half of the candidates."""
    torch.manual_seed(seed)
    network = ProxyNetwork(default_config(model, **{"width": 16, "accept_bias": 0.0} | settings))
    torch.nn.init.normal_(network.score.weight, std=1.5)
    return network


def assert_same(actual: Rollout, expected: Rollout) -> None:
    assert actual.responses == expected.responses
    assert actual.counts == expected.counts
    for name in ("token_ids", "accepted", "episodes"):
        actual_column, expected_column = (
            getattr(rollout.decisions, name) for rollout in (actual, expected)
        )
        assert torch.equal(actual_column, expected_column), name
    for name in ("hidden", "logprobs"):
        actual_column, expected_column = (
            getattr(rollout.decisions, name) for rollout in (actual, expected)
        )
        torch.testing.assert_close(actual_column, expected_column, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "decoding",
    [
        DECODING,
        replace(DECODING, temperature=0.7, top_k=5, top_p=0.8),
        replace(DECODING, temperature=1.5, top_k=0, top_p=1.0),
        replace(DECODING, temperature=0),
    ],
    ids=["default", "narrow", "wide", "greedy"],
)
def test_a_rollout_is_that_of_transformers(
    engine: VLLMBackend, frozen: PreTrainedModel, decoding: Decoding
) -> None:
    network = make_network(frozen, 0, max_rejections=4)
    expected = generate(
        Policy(frozen, network), PROMPTS, decoding, end_ids=ENDS, seeds=count(7 << 40)
    )
    actual = engine.generate(network, PROMPTS, decoding, end_ids=ENDS, seeds=count(7 << 40))
    assert_same(actual, expected)
    lengths = {len(response) for response in actual.responses}
    assert len(lengths) > 3 and max(lengths) == 24
    assert actual.counts.rejected > 50
    assert actual.counts.forced > 5 or decoding.temperature == 0  # greedy rows take the best


@pytest.mark.parametrize("top_k", [1, 5])
def test_the_frozen_llm_answers_as_in_transformers(
    engine: VLLMBackend, frozen: PreTrainedModel, top_k: int
) -> None:
    decoding = replace(DECODING, temperature=0.7, top_k=top_k, top_p=0.8)
    expected = generate(Policy(frozen), PROMPTS, decoding, end_ids=ENDS, seeds=count(7 << 40))
    actual = engine.responses(None, PROMPTS, decoding, end_ids=ENDS, seeds=count(7 << 40))
    assert actual == expected.responses


def given_responses(model: PreTrainedModel, decoding: Decoding) -> list[Response]:
    """The LLM's own responses, and some that it would not write, which share prompts that a cache would skip: as long
    as one of its blocks, longer, and with common first tokens of the responses.
    """
    own_responses = generate(
        Policy(model), PROMPTS, decoding, end_ids=ENDS, seeds=count(0)
    ).responses
    responses = [Response(*pair) for pair in zip(PROMPTS, own_responses, strict=True)]
    for prompt, start in (
        (range(20, 52), []),
        (range(20, 60), []),
        (range(30, 50), [70] * 12),
    ):
        responses += [Response([*prompt], [*start, i, *range(60, 70)]) for i in range(40, 60)]
    return responses


def assert_read_alike(reader: Reader, model: PreTrainedModel) -> None:
    decoding = Decoding(top_k=6, top_p=0.9, temperature=0.8, max_new_tokens=24)
    nucleus = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "max_candidates": 6}
    config, responses = default_config(model, **nucleus), given_responses(model, decoding)
    actual, expected = (
        reader(responses, config),
        read(responses, config, model=model, max_tokens=256),
    )
    num_own = len(PROMPTS)
    assert expected.outside[:num_own].sum() == 0 and expected.outside[num_own:].sum() > 0
    for name in ("counts", "tokens", "outside", "slots"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    in_nucleus = expected.logprobs > -torch.inf
    assert torch.equal(actual.token_ids[in_nucleus], expected.token_ids[in_nucleus])
    for name in ("hidden", "logprobs"):
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=0, atol=1e-4
        )


def test_what_the_cache_may_hold_of_a_response() -> None:
    shared, prompt = only_prompts_shared, [*range(6)]  # of which a block has 4
    assert shared([Response(prompt, [8, 9]), Response(prompt, [9, 8])], 4) == [True, True]
    assert shared([Response(prompt, [8, 9]), Response(prompt, [8, 9, 7])], 4) == [False, False]
    assert shared([Response(prompt, [8]), Response(prompt, [8])], 4) == [True, True]  # no block
    later = Response([*prompt, 8, 9, 5], [3])  # a turn later in the same conversation
    assert shared([Response(prompt, [8, 9]), later], 4) == [False, True]
    assert shared([Response(prompt[:4], [8]), Response(prompt[:4], [9])], 4) == [False, False]


def test_given_responses_are_read_as_transformers_read_them(
    engine: VLLMBackend, frozen: PreTrainedModel
) -> None:
    assert_read_alike(engine.read, frozen)


def test_a_prompt_is_read_once(
    engine: VLLMBackend, frozen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[Any] = []
    generate_whole = engine._llm.generate

    def record(*args: Any, **options: Any) -> list[Any]:
        outputs.extend(generate_whole(*args, **options))
        return outputs

    monkeypatch.setattr(engine._llm, "generate", record)
    config = default_config(frozen, max_candidates=6)
    engine.read([Response([*range(20, 60)], [i, 60]) for i in range(40, 50)], config)
    assert [output.num_cached_tokens for output in outputs] == [0] + 9 * [32]


def test_every_rollout_has_the_weights_of_its_moment(
    engine: VLLMBackend, frozen: PreTrainedModel
) -> None:
    """The weights from before an update are gone, even if the update changed nothing."""
    network = make_network(frozen, 1, max_rejections=2, max_candidates=6)
    responses = []
    for step in range(5):
        if step not in (0, 3):
            with torch.no_grad():
                network.score.weight.add_(torch.randn_like(network.score.weight))
        seeds = {"end_ids": ENDS, "seeds": count(0)}
        expected = generate(Policy(frozen, copy.deepcopy(network)), PROMPTS, DECODING, **seeds)
        actual = engine.generate(network, PROMPTS, DECODING, **seeds | {"seeds": count(0)})
        assert_same(actual, expected)
        responses.append(actual.responses)
    assert (
        responses[2] == responses[3]
        and responses[0] != responses[1] != responses[2] != responses[4]
    )
    (entry,) = engine._call("list_proxies")
    worker = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert [proxy.version for proxy in worker._registry.pool.proxies] == [entry["version"]]
    assert not worker._tracker.stats.traces._entries and not worker._reads


def test_more_responses_than_the_worker_keeps_traces_of(
    engine: VLLMBackend, frozen: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.rollout_vllm, "TRACED_REQUESTS", 10)
    network = make_network(frozen, 2)
    expected = generate(Policy(frozen, network), PROMPTS, DECODING, end_ids=ENDS, seeds=count(0))
    actual = engine.generate(network, PROMPTS, DECODING, end_ids=ENDS, seeds=count(0))
    assert_same(actual, expected)


def test_where_the_llm_leaves_no_choice_nothing_is_decided(
    engine: VLLMBackend, frozen: PreTrainedModel
) -> None:
    one_candidate = replace(DECODING, top_k=1)
    rollout = engine.generate(
        make_network(frozen, 3), PROMPTS, one_candidate, end_ids=ENDS, seeds=count(0)
    )
    assert rollout.decisions.hidden.shape == (0, 64)
    assert rollout.counts.proposed == rollout.counts.tokens == sum(map(len, rollout.responses))
    assert rollout.counts.rejected == rollout.counts.forced == 0


def test_what_was_asked_is_in_the_trace() -> None:
    def candidate(token_id: int, probability: float, accept: float | None) -> dict[str, Any]:
        return {"token_id": token_id, "probability": probability, "accept_probability": accept}

    rejected = [candidate(5, 0.1, 0.3), candidate(6, 0.6, 0.2)]
    accepted = candidate(9, 0.1, 0.9) | {"forced": False, "rejected": rejected}
    assert asked(accepted) == [(6, 0.6, False), (5, 0.1, False), (9, 0.1, True)]
    forced = candidate(6, 0.6, 0.2) | {"forced": True, "rejected": rejected}
    assert asked(forced) == [(6, 0.6, False), (5, 0.1, False)]
    single = candidate(9, 1.0, None) | {"forced": False, "rejected": []}
    assert asked(single) == []


def test_what_vllm_cannot_do_is_reported(
    make_engine: Callable[..., VLLMBackend],
    engine: VLLMBackend,
    frozen: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long_decoding = replace(DECODING, max_new_tokens=5000)
    with pytest.raises(TrainingError, match="5000 is over 4096"):
        engine.generate(
            make_network(frozen, 0), PROMPTS, long_decoding, end_ids=ENDS, seeds=count(0)
        )
    with pytest.raises(
        TrainingError, match="does not start with these settings: Value error.*100000.* greater"
    ):
        make_engine(max_tokens=100_000)
    monkeypatch.setattr(training.rollout_vllm, "is_installed", lambda: False)
    with pytest.raises(TrainingError, match="vLLM is not installed"):
        make_engine()


@pytest.mark.parametrize(
    ("rollout", "device", "parameters", "expected"),
    [
        ("auto", "cpu", 3_500_000, False),
        ("auto", "cpu", 134_515_008, True),
        ("auto", "cuda", 3_500_000, True),
        ("vllm", "cpu", 3_500_000, True),
        ("transformers", "cuda", 134_515_008, False),
        ("servers", "cuda", 134_515_008, False),
    ],
)
def test_what_samples(
    monkeypatch: pytest.MonkeyPatch, rollout: Any, device: str, parameters: int, expected: bool
) -> None:
    monkeypatch.setattr(rollout_backends, "machine", lambda: Machine(device, 10e9, "free"))
    options = rollout_backends.BackendOptions(rollout=rollout, rollout_memory=0.3)
    assert options.uses_vllm(parameters) == expected
    assert options.backend_bytes(parameters) == (3e9 if expected else 0)
