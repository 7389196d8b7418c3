"""The sampler of Model Runner V2 (MRV2) on a CPU: vLLM's own classes, given constructed steps.

MRV2 needs Triton, which is not there on a CPU. Real here: the worker, vLLM's sampler with all its states,
its request states and batches, and the runner's method that goes from hidden states to tokens.
Replaced, by plain torch: the Triton kernels on that way (`kernels`). Not here: the forward pass,
CUDA graphs, and `GPUModelRunner`'s making of the batch, which `Runner` stands in for.
`tests/proxy/model_runner_v2.py` runs all of it where Triton is installed.
"""

import dataclasses
import inspect
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from proxy.acceptance import Decision, decide, nucleus
from proxy.checkpoint import BaseModelId, ProxyError, save
from proxy.noise import noise_key, seeded_noise
from tests.proxy.proxies import EMBEDDINGS, H, V, random_network

# vLLM is imported inside the tests: it changes torch for the whole process.

CPU = torch.device("cpu")
SLOTS, MAX_TOKENS = 14, 128
HEAD = torch.randn(V, H, generator=torch.Generator().manual_seed(1)) * 0.7  # logits like an LLM's
NETWORKS = {
    "one": random_network(1, max_candidates=7, max_rejections=3),
    "two": random_network(2, width=10, max_candidates=12, temperature=0.8, top_p=0.9),
    "three": random_network(3, width=8, max_candidates=9, temperature=0.8, max_rejections=5),
}
BASE = BaseModelId(name="constructed", fingerprint="0")


def gumbel_sample(
    logits: Tensor, slots: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, **_: Any
) -> Tensor:
    """As vLLM's kernel: noise from (seed of the slot, position, token) alone; none at temperature 0."""
    tokens = []
    for row, slot, position in zip(logits, slots.tolist(), positions.tolist(), strict=True):
        generator = torch.Generator().manual_seed(hash((int(seeds[slot]), position)))
        noise = -torch.empty(len(row)).exponential_(generator=generator).log()
        tokens.append(int((row + noise * (temperature[slot] > 0)).argmax()))
    return torch.tensor(tokens)


def apply_temperature(logits: Tensor, slots: Tensor, temperature: Tensor) -> None:
    divisors = temperature[slots]
    logits.div_(torch.where(divisors == 0, 1.0, divisors).unsqueeze(-1))


def apply_min_p(logits: Tensor, slots: Tensor, min_p: Tensor) -> None:
    threshold = logits.max(-1, keepdim=True).values + min_p[slots].log().unsqueeze(-1)
    logits.masked_fill_(logits < threshold, float("-inf"))


def num_sampled_and_rejected(
    num_sampled: Tensor, seq_lens: Tensor, _: Tensor, slots: Tensor, prefill_lens: Tensor
) -> tuple[Tensor, Tensor]:
    num_sampled = num_sampled.masked_fill(seq_lens[: len(slots)] < prefill_lens[slots], 0)
    return num_sampled, torch.zeros_like(num_sampled)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in the place of vLLM's Triton kernels that lie between hidden states and tokens."""
    from vllm.v1.worker import cpu_worker  # noqa: F401  (gives MRV2's states buffers that a CPU has)
    from vllm.v1.worker.gpu.sample import sampler, states

    monkeypatch.setattr(sampler, "gumbel_sample", gumbel_sample)
    monkeypatch.setattr(sampler, "get_num_sampled_and_rejected", num_sampled_and_rejected)
    monkeypatch.setattr(states, "apply_temperature", apply_temperature)
    monkeypatch.setattr(states, "apply_min_p", apply_min_p)


class Model(torch.nn.Module):
    """An LLM that has nothing but its embedding and its head."""

    def embed_input_ids(self, token_ids: Tensor) -> Tensor:
        return EMBEDDINGS[token_ids]

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return hidden @ HEAD.T


class Runner:
    """The part of vLLM's GPUModelRunner that sampling uses, and the making of its steps.

    Rows are padded as for a CUDA graph, and slots differ from rows.
    """

    batch_sharder = rejection_sampler = speculative_config = None
    vocab_size = V

    def __init__(self, config: Any, **settings: Any) -> None:
        from vllm.v1.worker.gpu.sample.sampler import Sampler
        from vllm.v1.worker.gpu.states import RequestState

        self.model = Model()
        self.req_states = RequestState(SLOTS, MAX_TOKENS, MAX_TOKENS, 0, V, CPU)
        self.sampler = Sampler(config, SLOTS, V, CPU, self.req_states, **settings)
        self.execute_model_state: Any = None
        self.computed: dict[str, int] = {}

    def get_model(self) -> Model:
        return self.model

    def add(self, req_id: str, params: Any, prompt_len: int = 3) -> None:
        states = self.req_states
        states.add_request(req_id, prompt_len, [0] * prompt_len, 0, MAX_TOKENS)
        self.sampler.add_request(states.req_id_to_index[req_id], params)
        states.prefill_len.copy_to_uva()
        self.sampler.apply_staged_writes()
        self.computed[req_id] = 0

    def remove(self, req_id: str) -> None:
        self.req_states.remove_request(req_id)
        del self.computed[req_id]

    def schedule(self, **num_tokens: int) -> tuple[Tensor, Tensor]:
        """Run the "model" on this many tokens of each request. Returns hidden states and logits of the rows."""
        from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
        from vllm.v1.worker.gpu.model_runner import ExecuteModelState

        states, req_ids = self.req_states, list(num_tokens)
        slots = np.array([states.req_id_to_index[req_id] for req_id in req_ids])
        scheduled = np.array(list(num_tokens.values()), dtype=np.int32)
        computed = np.array([self.computed[req_id] for req_id in req_ids], dtype=np.int32)
        ends = np.cumsum(scheduled)
        total, padding = int(ends[-1]), 4
        positions = [
            np.arange(start, start + count)
            for start, count in zip(computed.tolist(), scheduled.tolist(), strict=True)
        ]
        dummy = InputBatch.make_dummy(
            len(req_ids), total + padding, InputBuffers(SLOTS, MAX_TOKENS, CPU)
        )
        batch = dataclasses.replace(
            dummy,
            req_ids=req_ids,
            num_reqs_after_padding=len(req_ids) + padding,
            idx_mapping=torch.from_numpy(slots),
            idx_mapping_np=slots,
            expanded_idx_mapping=torch.from_numpy(slots),
            num_scheduled_tokens=scheduled,
            num_tokens=total,
            num_tokens_after_padding=total + padding,
            seq_lens=torch.from_numpy(np.pad(computed + scheduled, (0, padding))),
            num_computed_tokens_np=computed,
            prefill_len_np=states.prefill_len.np[slots],
            num_computed_prefill_tokens_np=np.minimum(computed, states.prefill_len.np[slots]),
            positions=torch.from_numpy(np.pad(np.concatenate(positions), (0, padding))),
            logits_indices=torch.from_numpy(ends - 1),
        )
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(total + padding, H, generator=generator)
        for req_id, end in zip(req_ids, ends.tolist(), strict=True):
            # A position of a request has the same hidden state in every batch.
            self.computed[req_id] += num_tokens[req_id]
            generator.manual_seed(zlib.crc32(req_id.encode()) + self.computed[req_id])
            hidden[end - 1] = torch.randn(H, generator=generator)
        empty_fields = dict.fromkeys(ExecuteModelState._fields)
        self.execute_model_state = ExecuteModelState(
            **(empty_fields | {"input_batch": batch, "hidden_states": hidden})
        )
        rows = hidden[torch.from_numpy(ends - 1)]
        return rows, self.model.compute_logits(rows)

    def sample_tokens(self, grammar_output: None) -> Any:
        """As in vLLM, up to the tokens."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        state, self.execute_model_state = self.execute_model_state, None
        output, _, _ = GPUModelRunner.sample(
            self,
            state.hidden_states,
            state.input_batch,
            grammar_output,
        )
        return output


MakeWorker = Callable[..., Any]


@pytest.fixture
def make_worker(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> MakeWorker:
    """Workers over a `Runner` with these settings, with the proxies loaded."""
    from vllm.config import VllmConfig
    from vllm.envs import disable_envs_cache
    from vllm.v1.worker.gpu_worker import Worker

    import proxy.engine.ranks
    import proxy.worker

    group = SimpleNamespace(rank_in_group=0, world_size=1)
    monkeypatch.setattr(proxy.engine.ranks, "get_tp_group", lambda: group)
    monkeypatch.setattr(Worker, "load_model", lambda worker: None)
    config = VllmConfig()

    def make(*, v2: bool = True, sampler: Any = ..., load: bool = True, **settings: Any) -> Any:
        # vLLM asks for Triton when a configuration is made with this set, and not later.
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(v2)))
        disable_envs_cache()  # an engine in this process may have fixed its environment
        worker = proxy.worker.ProxyGPUWorker(config, 0, 0, "")
        worker.device = CPU
        worker.model_config = SimpleNamespace(
            get_hidden_size=lambda: H, get_vocab_size=lambda: V, model="constructed"
        )
        worker._base = BASE
        worker.model_runner = Runner(config, **settings)
        if sampler is not ...:
            worker.model_runner.sampler = sampler
        worker.load_model()
        for name, network in NETWORKS.items() if load else ():
            save(tmp_path / name, network, base=BASE, training={})
            worker.load_proxy(name, str(tmp_path / name))
        return worker

    return make


def params(proxy: str | None = None, **kwargs: Any) -> Any:
    from vllm import SamplingParams

    alignment: dict[str, Any] = {
        key: kwargs.pop(key) for key in ("strength", "max_rejections", "trace") if key in kwargs
    }
    if proxy is not None and "+" in proxy:
        alignment["proxies"] = dict.fromkeys(proxy.split("+"), alignment.pop("strength", 1.0))
        kwargs["extra_args"] = {"alignment": alignment}
    elif proxy is not None:
        kwargs["extra_args"] = {"alignment": {"proxy": proxy, **alignment}}
    return SamplingParams(**kwargs)


def step(worker: Any, **num_tokens: int) -> list[int]:
    worker.model_runner.schedule(**num_tokens)
    return worker.sample_tokens(None).sampled_token_ids.view(-1).tolist()


# name -> (proxy, or several, sampling parameters) of each request, in the order of the rows
MIXED: dict[str, Any] = {
    "a": ("one", {"seed": 1}),
    "b": (None, {"seed": 2, "top_p": 0.7}),
    "c": ("two", {"seed": 3, "top_p": 0.8, "temperature": 1.4}),
    "d": ("one", {"temperature": 0.0}),
    "e": (None, {"temperature": 0.0}),
    "f": ("two", {"seed": 4, "top_k": 5, "strength": 2.5, "max_rejections": 1}),
    "g": (None, {"seed": 5, "temperature": 0.6, "top_k": 9}),
    "h": ("one", {"seed": 6, "min_p": 0.05, "max_rejections": 0}),
    "i": ("two", {"seed": 7, "min_p": 0.1, "temperature": 0.8, "strength": 0.3}),
    "j": ("two", {"temperature": 0.0}),
    "k": ("one", {"seed": 8, "temperature": 0.3, "min_p": 0.02}),
    "l": ("three+two", {"seed": 9, "strength": 0.6}),
    "m": ("three+two", {"temperature": 0.0}),
}
PROMPT_LEN = {name: 3 + row for row, name in enumerate(MIXED)}  # all different
PROXIED = [name for name, (proxy, _) in MIXED.items() if proxy is not None]


def add_all(worker: Any, requests: dict[str, Any]) -> None:
    for name, (proxy, kwargs) in requests.items():
        worker.model_runner.add(name, params(proxy, **kwargs), PROMPT_LEN[name])


def expected_decision(
    proxy: str, kwargs: dict[str, Any], hidden: Tensor, logits: Tensor, seq_len: int
) -> Decision:
    """The decision of one row alone, by the tensor functions, without plan, pool and sampler."""
    networks = [NETWORKS[name] for name in proxy.split("+")]
    limits = ("max_candidates", "max_rejections", "top_p", "temperature")
    config = SimpleNamespace(
        **{name: min(getattr(network.config, name) for network in networks) for name in limits}
    )
    temperature = kwargs.get("temperature", 1.0)
    is_greedy = temperature == 0
    top_p = 1.0 if is_greedy else kwargs.get("top_p", 1.0)
    kwargs = kwargs | {"top_p": min(top_p, config.top_p)}
    logits = logits.unsqueeze(0) / config.temperature
    if min_p := kwargs.get("min_p"):
        logits = logits.masked_fill(logits.softmax(-1) < min_p * logits.softmax(-1).max(), -np.inf)
    candidates = nucleus(
        logits,
        config.max_candidates,
        torch.tensor([kwargs["top_k"]]) if "top_k" in kwargs else None,
        torch.tensor([kwargs["top_p"]]),
    )
    scores = [
        network(
            hidden.unsqueeze(0),
            network.candidate_table(EMBEDDINGS)[candidates.token_ids],
            candidates.logprobs,
        )
        for network in networks
    ]
    key = torch.tensor([noise_key(kwargs.get("seed", 0))])
    return decide(
        candidates,
        torch.stack(scores, 1),
        seeded_noise(key, torch.tensor([seq_len]), candidates.token_ids),
        strength=torch.tensor([[kwargs.get("strength", 1.0)] * len(networks)]),
        max_rejections=torch.tensor([kwargs.get("max_rejections", config.max_rejections)]),
        sharpness=torch.tensor([1.0 if is_greedy else config.temperature / temperature]),
        greedy=torch.tensor([is_greedy]),
    )


def tokens_of_v1(
    worker: Any, names: list[str], hidden: Tensor, logits: Tensor, positions: Tensor
) -> list[int]:
    """The V1 sampler's tokens for the same rows, with the worker's last plan."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    from proxy.engine.decision_stats import DecisionStats
    from proxy.engine.hook import Step
    from proxy.engine.sampler_v1 import ProxySampler

    sampling = [MIXED[name][1] for name in names]
    temperature = torch.tensor([kwargs.get("temperature", 1.0) for kwargs in sampling])
    empty_fields = {field.name: None for field in dataclasses.fields(SamplingMetadata)}
    metadata = SamplingMetadata(
        **(
            empty_fields
            | {
                "temperature": temperature,
                "all_greedy": False,
                "all_random": False,
                "generators": {},
                "top_k": torch.tensor([kwargs.get("top_k", V) for kwargs in sampling]).int(),
                "top_p": torch.tensor([kwargs.get("top_p", 1.0) for kwargs in sampling]),
                "logitsprocs": LogitsProcessors(),
            }
        )
    )
    sampler = Sampler()
    sampler.__class__ = ProxySampler
    stats = DecisionStats(CPU, reports=False)
    sampler.step = Step(worker._tracker._plan, hidden, positions, None, stats)
    return sampler.sample(logits.clone(), metadata)[0].tolist()


def test_rows_with_a_proxy_follow_the_definition(make_worker):
    worker = make_worker()
    add_all(worker, MIXED)
    names, position = list(MIXED), dict(PROMPT_LEN)
    agreements, forced = set(), 0
    for _ in range(30):
        is_first_step = position == PROMPT_LEN
        num_tokens = {name: (PROMPT_LEN[name] if is_first_step else 1) for name in names}
        hidden, logits = worker.model_runner.schedule(**num_tokens)
        output = worker.sample_tokens(None)
        assert output.num_sampled.tolist() == [1] * len(names)
        tokens = output.sampled_token_ids.view(-1).tolist()
        for row, name in enumerate(names):
            if name in PROXIED:
                proxy, kwargs = MIXED[name]
                expected = expected_decision(
                    proxy, kwargs, hidden[row], logits[row], position[name]
                )
                assert tokens[row] == expected.token_ids.item(), name
                forced += int(expected.forced)
                agreements.add(tokens[row] == logits[row].argmax().item())
            position[name] += 1
        names = names[1:] + names[:1]  # V2 orders its rows anew in every step
    assert agreements == {True, False} and forced > 0


def test_the_v1_sampler_gives_the_same_tokens(make_worker):
    worker = make_worker()
    names = [name for name in PROXIED if "min_p" not in MIXED[name][1]]  # V1 has it in a plug-in
    add_all(worker, {name: MIXED[name] for name in names})
    for index in range(20):
        num_tokens = {name: 1 if index else PROMPT_LEN[name] for name in names}
        hidden, logits = worker.model_runner.schedule(**num_tokens)
        tokens = worker.sample_tokens(None).sampled_token_ids.view(-1).tolist()
        positions = torch.tensor([PROMPT_LEN[name] + index for name in names], dtype=torch.int32)
        assert tokens_of_v1(worker, names, hidden, logits, positions) == tokens


def test_rows_without_a_proxy_get_what_vllm_would_draw(make_worker):
    """In a mixed batch, beside strength 0 and an unknown proxy, and with no proxy loaded at all."""
    worker, stock = make_worker(), make_worker(load=False)
    stock_requests = {
        name: (
            None,
            {
                key: value
                for key, value in kwargs.items()
                if key not in ("strength", "max_rejections")
            },
        )
        for name, (_, kwargs) in MIXED.items()
    }
    requests = MIXED | {
        "b": ("nobody", MIXED["b"][1]),
        "g": ("one", MIXED["g"][1] | {"strength": 0}),
    }
    add_all(worker, requests)
    add_all(stock, stock_requests)
    num_different = 0
    for index in range(20):
        num_tokens = dict.fromkeys(MIXED, 1) if index else PROMPT_LEN
        tokens, expected = step(worker, **num_tokens), step(stock, **num_tokens)
        for row, name in enumerate(MIXED):
            if name not in PROXIED:
                assert tokens[row] == expected[row], name
            num_different += tokens[row] != expected[row]
    assert num_different > 20
    assert stock.model_runner.sampler.step is None


def test_only_rows_of_the_batch_are_counted(make_worker):
    """A prompt in chunks is sampled in every step and emits a token in the last; padding never does."""
    worker = make_worker()
    runner = worker.model_runner
    runner.add("chatcmpl-a-00000000", params("one", seed=1), prompt_len=9)
    runner.add("chatcmpl-b-00000000", params("two", seed=2))
    for a, b, emitted in ((4, 3, [0, 1]), (4, 1, [0, 1]), (1, 1, [1, 1]), (1, 1, [1, 1])):
        runner.schedule(**{"chatcmpl-a-00000000": a, "chatcmpl-b-00000000": b})
        hidden, positions, discarded = worker._runner.sampling_inputs()
        assert len(hidden) == len(positions) == 2
        unfinished = [False, False] if discarded is None else discarded.tolist()
        assert unfinished == [not is_emitted for is_emitted in emitted]
        assert worker.sample_tokens(None).num_sampled.tolist() == emitted
    counts = worker.take_alignment_counts(["chatcmpl-a", "chatcmpl-b"])
    lengths = {req_id: entry["accepted"] + entry["forced"] for req_id, entry in counts.items()}
    assert lengths == {"chatcmpl-a-00000000": 2, "chatcmpl-b-00000000": 4}
    assert all(
        entry["proposed"] == entry["accepted"] + entry["rejected"] for entry in counts.values()
    )


def test_chunks_and_preemption_do_not_change_what_a_seed_gives(make_worker):
    """The token at a position is the same with a whole prompt, with chunks, and after a preemption."""
    unchunked, chunked = make_worker(), make_worker()
    for worker in (unchunked, chunked):
        worker.model_runner.add("a", params("one", seed=1), prompt_len=6)
    expected = [step(unchunked, a=n)[0] for n in (6, 1, 1, 1, 1)]
    assert len({*expected}) > 2
    runner = chunked.model_runner
    step(chunked, a=2)
    assert [step(chunked, a=n)[0] for n in (4, 1)] == expected[:2]
    # V2 forgets a preempted request, and gets it again with its output as part of the prompt.
    runner.remove("a")
    runner.add("b", params("two", seed=2))
    step(chunked, b=3)
    runner.add("a", params("one", seed=1), prompt_len=8)
    assert step(chunked, a=3, b=1)[0] in range(V)
    assert [step(chunked, b=1, a=n)[1] for n in (5, 1, 1)] == expected[2:]


def test_a_slot_is_given_on_without_its_proxy(make_worker):
    worker, stock = make_worker(), make_worker(load=False)
    runner = worker.model_runner
    runner.add("a", params("one", seed=1))
    slot = runner.req_states.req_id_to_index["a"]
    for size in (3, 1):
        step(worker, a=size)
    runner.remove("a")
    for target in (worker, stock):
        target.model_runner.add("b", params(seed=9))
    assert runner.req_states.req_id_to_index["b"] == slot
    assert [step(worker, b=n) for n in (3, 1, 1)] == [step(stock, b=n) for n in (3, 1, 1)]
    assert worker.take_alignment_counts(["b"]) == {}
    runner.remove("b")
    runner.add("c", params("two", seed=1))
    hidden, logits = runner.schedule(c=3)
    token = worker.sample_tokens(None).sampled_token_ids.item()
    assert token == expected_decision("two", {"seed": 1}, hidden[0], logits[0], 3).token_ids.item()


def test_a_shadow_scores_and_changes_nothing(make_worker, tmp_path):
    worker, stock = make_worker(load=False), make_worker(load=False)
    save(tmp_path / "shadow", NETWORKS["one"], base=BASE, training={})
    worker.load_proxy("shadow", str(tmp_path / "shadow"), True)
    # Every emitted token is among the seven candidates that the shadow scores.
    requests = {"a": (None, {"seed": 1, "top_k": 5}), "b": (None, {"temperature": 0.0})}
    torch.manual_seed(0)  # the shadow's own noise
    scored: list[tuple[int, int]] = []
    worker._tracker.stats.record_shadow = lambda _, scores, changes: scored.append(
        (int(scores.sum()), int((scores & changes).sum()))
    )
    for target in (worker, stock):
        add_all(target, requests)
    for size in (3, *[1] * 9):
        assert step(worker, a=size, b=size) == step(stock, a=size, b=size)
    # The prompt of b is one token longer than its first chunk, so its first draw is discarded.
    assert sum(tokens for tokens, _ in scored) == 19
    assert 0 < sum(changed for _, changed in scored) < 19


@pytest.mark.parametrize(
    "settings", [{"logprobs_mode": "processed_logits"}, {"return_sampling_mask": True}]
)
def test_what_is_shown_of_the_nucleus_is_vllms(make_worker, monkeypatch, settings):
    """Processed logits and sampling masks are of the LLM's nucleus: a proxy's at its own temperature."""
    from vllm.v1.worker.gpu.sample import sampler

    shown_logits: list[Tensor] = []

    def compute_topk_scores(logits: Tensor, *args: Any, **kwargs: Any) -> None:
        shown_logits.append(logits.clone())

    class Masks:
        from_logits = staticmethod(compute_topk_scores)

    monkeypatch.setattr(sampler, "compute_topk_scores", compute_topk_scores)
    monkeypatch.setattr(sampler, "SamplingMaskTensors", Masks)
    proxied, stock = make_worker(**settings), make_worker(load=False, **settings)
    logprobs = {} if "return_sampling_mask" in settings else {"logprobs": 2}
    for worker in (proxied, stock):
        for name in ("a", "b", "c", "f"):
            proxy, kwargs = MIXED[name]
            if worker is stock and proxy is not None:
                kwargs = kwargs | {"temperature": NETWORKS[proxy].config.temperature}
            worker.model_runner.add(name, params(proxy, **kwargs, **logprobs))
        step(worker, a=3, b=3, c=3, f=3)
    assert torch.equal(shown_logits[0], shown_logits[1])
    assert shown_logits[0].isfinite().sum(-1).tolist()[::3] == [V, 5]


def test_a_step_that_the_plan_is_not_for_is_vllms(make_worker):
    """Profiling runs call the sampler with rows that the worker has not seen."""
    from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

    worker = make_worker()
    sampler = worker.model_runner.sampler
    dummy = InputBatch.make_dummy(5, 5, InputBuffers(SLOTS, MAX_TOKENS, CPU))
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(3))
    assert sampler.step is None
    tokens = sampler(logits.clone(), dummy).sampled_token_ids.view(-1)
    assert torch.equal(tokens, logits.argmax(-1))  # unused slots are greedy


def test_the_worker_picks_by_the_model_runner(make_worker):
    from vllm.v1.sample.sampler import Sampler

    import proxy.engine.sampler_v1
    import proxy.engine.sampler_v2
    from proxy.engine.runner import RunnerV1, RunnerV2

    worker = make_worker(load=False)
    assert worker.use_v2_model_runner
    assert type(worker.model_runner.sampler) is proxy.engine.sampler_v2.ProxySamplerV2
    assert type(worker._runner) is RunnerV2
    worker = make_worker(v2=False, sampler=Sampler(), load=False)
    assert not worker.use_v2_model_runner
    assert type(worker.model_runner.sampler) is proxy.engine.sampler_v1.ProxySampler
    assert type(worker._runner) is RunnerV1


def test_other_samplers_are_refused(make_worker):
    from vllm.v1.watermarking.gpu_sampler import GPUWatermarkSampler

    with pytest.raises(ProxyError, match="GPUWatermarkSampler"):
        make_worker(sampler=object.__new__(GPUWatermarkSampler))
    with pytest.raises(ProxyError, match="GPUWatermarkSampler"):
        make_worker(v2=False, sampler=object.__new__(GPUWatermarkSampler))


def parameters(function: Any) -> list[str]:
    """Parameter names in order; `*` stands before those that are by keyword only."""
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in names:
            names.append("*")
        names.append(name)
    return names


SAMPLE_RANDOM = [
    "self", "processed_logits", "expanded_idx_mapping", "idx_mapping_np", "pos", "top_k", "top_p",
    "use_fused_sampler",
]  # fmt: skip
VERIFY = [
    "self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping",
    "idx_mapping_np", "expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np",
    "verify_draft_sampled",
]  # fmt: skip
WORKER = [
    "self", "vllm_config", "local_rank", "rank", "distributed_init_method", "is_driver_worker"
]  # fmt: skip


def test_vllms_methods_are_those_that_we_override_and_call():
    """The parts of vLLM that the samplers of proxy/engine and proxy/worker.py rely on, for whoever upgrades vLLM."""
    from vllm.v1.sample import rejection_sampler
    from vllm.v1.sample import sampler as v1
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler
    from vllm.v1.worker.gpu_worker import Worker

    from proxy.engine import drafts_cpu
    from proxy.engine.rejection_v1 import ProxyRejectionSampler
    from proxy.engine.rejection_v2 import ProxyRejectionSamplerV2
    from proxy.engine.sampler_v1 import ProxySampler
    from proxy.engine.sampler_v2 import ProxySamplerV2

    expected = {
        RejectionSampler._verify: VERIFY,
        RejectionSampler._verify_in_chunks: [
            "self", "logits", "input_batch", "draft_logits", "draft_sampled", "pos",
            "max_chunk_logits", "max_num_logprobs", "verify_draft_sampled",
        ],
        Sampler.apply_sampling_params: [
            "self", "logits", "expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos",
            "input_ids", "expanded_local_pos", "seq_lens_upper_bound_np", "skip_top_k_top_p",
        ],
        rejection_sampler.RejectionSampler.apply_logits_processors: [
            "self", "logits", "sampling_metadata", "metadata"
        ],
        rejection_sampler.RejectionSampler._get_logprobs_tensors: [
            "self", "max_num_logprobs", "metadata", "logits", "target_logits", "bonus_logits",
            "sampled_token_ids",
        ],
        rejection_sampler.rejection_sample: [
            "draft_token_ids", "num_draft_tokens", "max_spec_len", "cu_num_draft_tokens",
            "draft_probs", "target_logits", "bonus_token_ids", "sampling_metadata",
            "synthetic_mode", "synthetic_conditional_rates", "use_fp64_gumbel",
        ],
        rejection_sampler.apply_sampling_constraints: [
            "logits", "cu_num_draft_tokens", "sampling_metadata"
        ],
        v1.Sampler.apply_logits_processors: [
            "self", "logits", "sampling_metadata", "predict_bonus_token"
        ],
        v1.Sampler.gather_specific_token_logprobs: [
            "self", "logprobs", "logprob_token_ids", "sampled"
        ],
        Sampler.add_request: ["self", "req_idx", "sampling_params"],
        Sampler._sample_random: SAMPLE_RANDOM,
        Sampler.get_logprobs_dims: ["self", "idx_mapping_np", "include_token_ids"],
        Sampler.__call__: ["self", "logits", "input_batch"],
        v1.Sampler.sample: ["self", "logits", "sampling_metadata", "logprobs_mode_override"],
        v1.Sampler.apply_temperature: ["logits", "temp", "all_random"],
        v1.Sampler.greedy_sample: ["logits"],
        v1.Sampler.compute_logprobs: ["logits"],
        v1.TopKTopPSampler.forward_native: ["self", "logits", "generators", "k", "p"],
        apply_top_k_top_p: ["logits", "k", "p"],
        Worker.__init__: WORKER,
        CPUWorker.__init__: WORKER,
        Worker.load_model: ["self", "*", "load_dummy_weights"],
        Worker.sample_tokens: ["self", "grammar_output"],
        GPUModelRunner.get_model: ["self"],
        GPUModelRunner.sample: ["self", "hidden_states", "input_batch", "grammar_output"],
        GPUModelRunner.sample_tokens: ["self", "grammar_output"],
    }  # fmt: skip
    assert {function: parameters(function) for function in expected} == expected
    assert CPUWorker.load_model is Worker.load_model
    assert CPUWorker.sample_tokens is Worker.sample_tokens
    for override, original in (
        (ProxySamplerV2.add_request, Sampler.add_request),
        (ProxySamplerV2._sample_random, Sampler._sample_random),
        (ProxySampler.forward, v1.Sampler.forward),
        (ProxySampler.sample, v1.Sampler.sample),
        (ProxyRejectionSampler.forward, rejection_sampler.RejectionSampler.forward),
        (ProxyRejectionSamplerV2._verify, RejectionSampler._verify),
        (drafts_cpu.expand_batch_to_tokens, rejection_sampler.expand_batch_to_tokens),
    ):
        assert parameters(override) == parameters(original)


def test_nothing_has_joined_what_may_change_logits_before_the_draw():
    """`ProxySampler.forward` skips vLLM's stages where it knows that none has work to do."""
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS
    from vllm.v1.sample.metadata import SamplingMetadata

    from proxy.engine.sampler_v1 import _WORK_OF

    assert {*BUILTIN_LOGITS_PROCESSORS} == {*_WORK_OF}
    assert {field.name for field in dataclasses.fields(SamplingMetadata)} == {
        "temperature", "all_greedy", "all_random", "top_p", "top_k", "generators",
        "max_num_logprobs", "logprob_token_ids", "no_penalties", "prompt_token_ids",
        "frequency_penalties", "presence_penalties", "repetition_penalties", "output_token_ids",
        "allowed_token_ids_mask", "bad_words_token_ids", "logitsprocs", "spec_token_ids",
        "thinking_budget_state_holder",
    }  # fmt: skip


class PlugIn:
    """A logits processor that is none of vLLM's."""

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"max_num_logprobs": 0}, False),
        ({"logprob_token_ids": {0: [1]}}, False),
        ({"no_penalties": False}, False),
        ({"allowed_token_ids_mask": torch.ones(1, V, dtype=torch.bool)}, False),
        ({"bad_words_token_ids": {0: [[1]]}}, False),
        ({"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: True)}, False),
        ({"thinking_budget_state_holder": SimpleNamespace(has_tracked_requests=lambda: False)}, True),
        ({"plug_in": True}, False),
        ({"min_toks": {0: 1}}, False),
        ({"biases": {0: {1: 2.0}}}, False),
        ({"min_p_count": 1}, False),
    ],
)  # fmt: skip
def test_stages_are_skipped_only_where_they_have_no_work(changed, expected):
    from vllm.v1.sample.logits_processor import BUILTIN_LOGITS_PROCESSORS, LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    from proxy.engine.batch_plan import make_plan
    from proxy.engine.pool import ProxyPool
    from proxy.engine.sampler_v1 import _WORK_OF, only_proxies_decide

    processors: list[Any] = [object.__new__(kind) for kind in BUILTIN_LOGITS_PROCESSORS]
    for processor in processors:
        name = _WORK_OF[type(processor)]
        setattr(processor, name, changed.get(name, {}))
    if "plug_in" in changed:
        processors.append(PlugIn())
    fields: dict[str, Any] = {field.name: None for field in dataclasses.fields(SamplingMetadata)}
    fields |= {"no_penalties": True, "logitsprocs": LogitsProcessors(processors)}
    fields |= {name: value for name, value in changed.items() if name in fields}
    plan = make_plan([], [], ProxyPool(), CPU, shadows=())
    assert only_proxies_decide(plan, SamplingMetadata(**fields)) is expected
    assert not only_proxies_decide(plan._replace(unproxied_rows=[0]), SamplingMetadata(**fields))


def test_what_a_step_is_read_from_is_there():
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import ExecuteModelState, GPUModelRunner

    fields = {field.name for field in dataclasses.fields(InputBatch)}
    assert fields >= {
        "req_ids", "num_reqs", "idx_mapping", "logits_indices", "num_scheduled_tokens", "seq_lens",
        "num_computed_prefill_tokens_np", "prefill_len_np", "num_draft_tokens", "cu_num_logits_np",
        "expanded_idx_mapping", "expanded_local_pos",
    }  # fmt: skip
    assert {"input_batch", "hidden_states"} <= {*ExecuteModelState._fields}
    init_source = inspect.getsource(GPUModelRunner.__init__)
    for attribute in ("req_states", "sampler", "rejection_sampler", "execute_model_state"):
        assert f"self.{attribute}" in init_source
    # The rows of the logits are those that we take, and the batch is the one that we read.
    sample_source = inspect.getsource(GPUModelRunner.sample)
    assert "sample_hidden_states = hidden_states[input_batch.logits_indices]" in sample_source
    assert "self.model.compute_logits(sample_hidden_states)" in sample_source
    assert "self.sampler(logits, input_batch)" in sample_source


def test_preempted_requests_keep_a_proxy_that_is_unloaded(make_worker, monkeypatch):
    """V2 forgets them, and gets them again as new ones: meanwhile they are nowhere in its state."""
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(Worker, "execute_model", lambda worker, scheduled: None)
    worker = make_worker()
    runner, scheduled = worker.model_runner, SchedulerOutput.make_empty()
    for name, proxy in (("a", "one"), ("b", None)):
        runner.add(name, params(proxy, seed=1))
    token = step(worker, a=3, b=3)[0]
    worker.execute_model(dataclasses.replace(scheduled, preempted_req_ids={"a"}))
    runner.remove("a")
    for name in NETWORKS:
        worker.unload_proxy(name)
    step(worker, b=1)
    assert [served.name for served in worker._registry.pool.proxies] == ["one"]
    worker.execute_model(
        dataclasses.replace(
            scheduled, scheduled_new_reqs=[SimpleNamespace(req_id="a", sampling_params=None)]
        )
    )
    runner.add("a", params("one", seed=1))
    assert step(worker, a=3, b=1)[0] == token
    runner.remove("a")
    worker.execute_model(dataclasses.replace(scheduled, finished_req_ids={"a"}))
    step(worker, b=1)
    assert worker._registry.pool.proxies == []


def test_logprobs_are_numbers_where_no_token_is_allowed():
    from proxy.engine.sampler_v1 import ProxySampler

    logits = torch.tensor([[-torch.inf] * 3, [0.0, 0.0, -torch.inf]])
    logprobs = ProxySampler.compute_logprobs(logits)
    assert logprobs[0].tolist() == [-torch.inf] * 3
    assert logprobs[1].exp().tolist() == [0.5, 0.5, 0.0]
