"""The trainer's rollout: its sampling distribution, and its decisions compared with the server's.

False alarms: below 1e-6 for each test of a distribution (`tests.proxy.references`), with fixed seeds. Decisions are
compared one by one, except in rows where rounding may decide.
"""

from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import training.rollout
from proxy.acceptance import Decision
from proxy.checkpoint import identify, save
from proxy.engine.hook import sample_proxied_rows
from proxy.engine.sampler_v1 import ProxySampler
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.noise import seeded_noise
from tests.proxy.conftest import make_llm, model_dir  # noqa: F401
from tests.proxy.references import (
    AmbiguousError,
    Outcome,
    Setting,
    accept_logits_of,
    assert_follows,
    canonical,
    token_distribution,
    with_ties,
)
from training.policy import Decoding, Policy
from training.rollout import Rollout, generate

# Of different widths, K and limits, so that a pool of them has to pad.
PROXIES: dict[str, dict[str, Any]] = {
    "wide": {
        **{"width": 64, "max_candidates": 8, "max_rejections": 8},
        **{"temperature": 0.8, "top_k": 6, "top_p": 0.85},
    },
    "narrow": {"width": 16, "max_candidates": 5, "max_rejections": 2, "use_logprob": False},
    "never": {"width": 8, "max_candidates": 6, "max_rejections": 3, "accept_bias": -60.0},
    "silent": {"width": 8, "max_candidates": 6, "max_rejections": 0},
}


@pytest.fixture(scope="module")
def networks() -> dict[str, ProxyNetwork]:
    by_name = {}
    for seed, (name, config) in enumerate(PROXIES.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "vocab_size": 288, "accept_bias": 0.0}
        by_name[name] = ProxyNetwork(ProxyConfig(**sizes | config)).requires_grad_(False)
        torch.nn.init.normal_(by_name[name].score.weight, std=1.5)
    return by_name


@pytest.fixture(scope="module")
def load_frozen(model_dir) -> Callable[[torch.dtype], PreTrainedModel]:  # noqa: F811
    return lambda dtype: AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval()


# --- the sampling distribution ---


class Request(NamedTuple):
    proxy: str
    strength: float
    decoding: Decoding

    @property
    def setting(self) -> Setting:
        if self.strength == 0:  # the frozen LLM
            decoding = self.decoding
            return Setting(
                temperature=decoding.temperature,
                top_k=decoding.top_k,
                top_p=decoding.top_p,
                strength=0,
                max_candidates=288,
                trained_temperature=decoding.temperature,
            )
        config = PROXIES[self.proxy]
        limits = {key: config[key] for key in ("max_candidates", "max_rejections")}
        trained = {
            f"trained_{key}": config[key]
            for key in ("temperature", "top_k", "top_p")
            if key in config
        }
        return Setting(
            **trained,
            temperature=self.decoding.temperature,
            top_k=self.decoding.top_k,
            top_p=self.decoding.top_p,
            strength=self.strength,
            **limits,
        )


def make_request(
    proxy: str, strength: float, temperature: float, top_k: int, top_p: float
) -> Request:
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=1)
    return Request(proxy, strength, decoding)


REQUESTS = [
    make_request("wide", 1.0, 1.0, 0, 1.0),
    make_request("wide", 0.5, 0.7, 0, 0.93),
    make_request("wide", 3.0, 1.4, 6, 1.0),
    make_request("wide", 1.0, 2.0, 40, 0.75),
    make_request("wide", 1.0, 1.0, 1, 1.0),  # a single candidate
    make_request("wide", 1.0, 0.0, 1, 0.1),  # greedy: the top-k and top-p of the training
    make_request("wide", 1.0, 0.2, 0, 0.93),
    make_request("wide", 3.0, 0.0, 0, 1.0),
    make_request("narrow", 1.0, 1.0, 0, 1.0),
    make_request("narrow", 3.0, 1.4, 4, 0.9),
    make_request("narrow", 0.5, 0.7, 6, 0.8),
    make_request("narrow", 0.0, 1.4, 40, 0.9),
    make_request("never", 1.0, 1.0, 0, 1.0),  # all rejected
    make_request("never", 1.0, 0.0, 0, 1.0),
    make_request("silent", 1.0, 1.0, 0, 1.0),
]


def outcomes(rollout: Rollout) -> list[Outcome]:
    """Token, number proposed and forced flag of responses of one token each."""
    accepted_by_episode: defaultdict[int, list[bool]] = defaultdict(list)
    decisions = rollout.decisions
    for episode, accepted in zip(
        decisions.episodes.tolist(), decisions.accepted.tolist(), strict=True
    ):
        accepted_by_episode[episode].append(accepted)
    results, counts = [], rollout.counts
    for episode, (token_id,) in enumerate(rollout.responses):
        if episode in accepted_by_episode:
            flags = accepted_by_episode[episode]
            results.append((token_id, len(flags), True not in flags))
        else:  # a single candidate, or no rejection allowed: the same in all episodes
            results.append((token_id, counts.proposed // counts.tokens, counts.forced > 0))
    assert sum(proposed for _, proposed, _ in results) == counts.proposed
    assert sum(forced for *_, forced in results) == counts.forced
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_rollout_follows_the_enumerated_distribution(load_frozen, networks, monkeypatch, dtype):
    """In bf16 the distribution is that of the rollout's own hidden states and of tied logits, where it is clear."""
    rows, prompt = 4000, [7, 12, 9]
    frozen = load_frozen(dtype)
    embeddings = frozen.get_input_embeddings().weight
    recorded: list[tuple[Tensor, Tensor]] = []
    original = training.rollout._step

    def step(policy: Policy, logits: Tensor, hidden: Tensor, *args: Any) -> Decision:
        if dtype == torch.bfloat16:  # the same for all rows, even where rounding differs
            logits, hidden = with_ties(logits[:1].expand_as(logits)), hidden[:1].expand_as(hidden)
        recorded.append((logits[0], hidden[0]))
        return original(policy, logits, hidden, *args)

    monkeypatch.setattr(training.rollout, "_step", step)
    frozen_output = load_frozen(torch.float64)(torch.tensor([prompt]), output_hidden_states=True)
    had_ties = []  # whether there were ties
    for request in REQUESTS:
        network = networks[request.proxy]
        policy = Policy(frozen, network, request.strength)
        rollout = generate(policy, [prompt] * rows, request.decoding, end_ids=(), seeds=count(1))
        logits, hidden = recorded.pop()
        if dtype == torch.float32:
            logits, hidden = frozen_output.logits[0, -1], frozen_output.hidden_states[-1][0, -1]
        scores = logits.double().numpy()

        def accept_logits(
            token_ids: list[int], logprobs: list[float], network=network, hidden=hidden
        ) -> list[float]:
            return accept_logits_of(network, hidden, embeddings, token_ids, logprobs)

        try:
            distribution = token_distribution(scores, request.setting, accept_logits)
        except AmbiguousError:
            continue
        counts = Counter(canonical(outcome, scores) for outcome in outcomes(rollout))
        assert_follows(counts, distribution, tests=len(REQUESTS))
        tokens = {token for token, *_ in distribution}
        had_ties.append(len({scores[token] for token in tokens}) < len(tokens))
    if dtype == torch.float32:
        assert had_ties == [False] * len(REQUESTS)
    else:
        assert sum(had_ties) >= 5, had_ties


# --- trainer and server ---


class ServerDecisions(NamedTuple):
    """The server's decisions in R rows, and their inputs."""

    logits: Tensor  # [R, V] before the temperature
    hidden: Tensor  # [R, H]
    keys: Tensor  # [R] int64, of the noise
    positions: Tensor  # [R] int
    token_ids: Tensor  # [R] int64
    num_proposed: Tensor  # [R] int64
    forced: Tensor  # [R] bool


class ServerTraces(NamedTuple):
    """Their traces, where requests are traced."""

    candidate_ids: Tensor  # [R, K]
    logprobs: Tensor  # [R, K]
    accept_logits: Tensor  # [R, K]


class Recorder:
    """Stands in for the stats, and keeps the last decision."""

    def record(self, rows: Any, decision: Decision, discarded: Any, tracing: Any) -> None:
        self.decision, self.tracing = decision, tracing

    def record_seconds(self, seconds: float) -> None:
        pass


def decide_in_engine(
    llm: Any,
    requests: list[Request],
    monkeypatch: pytest.MonkeyPatch,
    *,
    trace: bool,
    with_unproxied: bool,
) -> list[tuple[ServerDecisions, ServerTraces | None]]:
    """Generate a long answer to each request, in common batches. Returns the decisions of each request.

    `with_unproxied`: requests without a proxy are among them.
    """
    from vllm import SamplingParams

    raw_logits: list[Tensor] = []
    decided: defaultdict[str, list[ServerDecisions]] = defaultdict(list)
    traced: defaultdict[str, list[ServerTraces]] = defaultdict(list)
    forward = ProxySampler.forward

    def recorded_forward(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        raw_logits[:] = [logits.float().clone()]
        return forward(self, logits, *args, **kwargs)

    def recorded_align(step: Any, *args: Any, **kwargs: Any) -> Tensor:
        recorder = Recorder()
        rows = step.plan.proxied
        token_ids = sample_proxied_rows(step._replace(stats=recorder), *args, **kwargs)
        columns = (
            *(rows.select_rows(tensor).clone() for tensor in (raw_logits[0], step.hidden)),
            torch.tensor([assignment.key for assignment in rows.assignments]),
            rows.select_rows(step.positions[: len(step.hidden)]).clone(),
            *recorder.decision.columns[1:].clone(),
        )
        for row, assignment in enumerate(rows.assignments):
            req_id = assignment.req_id.rsplit("-", 1)[0]
            decided[req_id].append(ServerDecisions(*(column[row] for column in columns)))
            if recorder.tracing is not None:
                candidates, accept_logits, _ = recorder.tracing
                traced_columns = (*candidates, accept_logits)
                traced[req_id].append(ServerTraces(*(column[row] for column in traced_columns)))
        return token_ids

    monkeypatch.setattr(ProxySampler, "forward", recorded_forward)
    monkeypatch.setattr("proxy.engine.sampler_v1.sample_proxied_rows", recorded_align)
    prompts, params = [], []
    for i, request in enumerate(requests):
        decoding = request.decoding
        sampling = {
            "temperature": decoding.temperature,
            "top_k": decoding.top_k,
            "top_p": decoding.top_p,
            "max_tokens": 30,
            "ignore_eos": True,
            "detokenize": False,
            "seed": i,
        }
        alignment = {"proxy": request.proxy, "strength": request.strength, "trace": trace}
        prompts.append({"prompt_token_ids": [i % 250 + 5, *range(i % 7)]})
        params.append(SamplingParams(**sampling, extra_args={"alignment": alignment}))
    num_unproxied = len(prompts) if with_unproxied else 0
    prompts += prompts[:num_unproxied]
    params += [SamplingParams(**sampling | {"seed": i}) for i in range(num_unproxied)]
    outputs = llm.generate(prompts, params, use_tqdm=False)[: len(requests)]
    result = []
    for output in outputs:
        decisions = decided[output.request_id]
        # The recorded tokens are those that the engine emitted.
        emitted = list(output.outputs[0].token_ids)
        assert [step.token_ids.item() for step in decisions] == emitted and len(emitted) == 30
        traces = traced.get(output.request_id)
        result.append((stack(decisions), stack(traces) if traces else None))
    return result


def stack(rows: list[Any]) -> Any:
    """Stack tuples of tensors, field by field."""
    return type(rows[0])(*(torch.stack(column) for column in zip(*rows, strict=True)))


def decide_in_training(
    policy: Policy, request: Request, server: ServerDecisions, jitter: float = 0
) -> Decision:
    """The rollout's step with the server's numbers; `jitter` is the relative error of the noise."""

    def draw(token_ids: Tensor) -> Tensor:
        noise = seeded_noise(server.keys, server.positions, token_ids)
        return noise * (1 + jitter * torch.randn_like(noise).sign())

    count = len(server.logits)
    return training.rollout._step(
        policy,
        server.logits,
        server.hidden,
        request.decoding,
        draw,
        torch.ones(count, dtype=torch.bool),
        training.rollout._Records(count, torch.device("cpu"), measure_kl=False),
    )


class Comparison(NamedTuple):
    """Rows of all requests together, [R] bool each."""

    differs: Tensor  # in the token, the number proposed or the forced flag
    ambiguous: Tensor  # rounding may decide
    tied: Tensor  # two of the nine largest logits are equal


@pytest.fixture
def compare(
    make_llm,  # noqa: F811
    model_dir,  # noqa: F811
    load_frozen,
    networks,
    tmp_path,
    monkeypatch,
) -> Callable[..., Comparison]:
    """Runs requests of all kinds at once in the engine, and the trainer's step on the engine's inputs."""

    def run(dtype: torch.dtype, *, trace: bool, with_unproxied: bool) -> Comparison:
        llm = make_llm(
            worker_cls="proxy.worker.ProxyCPUWorker",
            dtype=str(dtype).removeprefix("torch."),
            max_num_seqs=256,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=128 << 20,
        )
        for name, network in networks.items():
            save(tmp_path / name, network, base=identify(str(model_dir)), training={})
            llm.collective_rpc("load_proxy", args=(name, str(tmp_path / name)))
        frozen = load_frozen(dtype)
        requests = [request for request in REQUESTS if request.strength > 0] * 8
        torch.manual_seed(0)
        parts = []
        for request, (server, traced) in zip(
            requests,
            decide_in_engine(
                llm, requests, monkeypatch, trace=trace, with_unproxied=with_unproxied
            ),
            strict=True,
        ):
            policy = Policy(frozen, networks[request.proxy], request.strength)
            decision = decide_in_training(policy, request, server)
            server_columns = server[4:]
            differs = torch.stack(
                [a != b for a, b in zip(decision.columns[1:], server_columns, strict=True)]
            ).any(0)
            ambiguous = torch.zeros_like(differs)
            for _ in range(4):
                ambiguous |= (
                    decide_in_training(policy, request, server, 1e-4).token_ids
                    != decision.token_ids
                )
            best = server.logits.topk(9).values
            tied = (best[:, 1:] == best[:, :-1]).any(-1)
            parts.append(Comparison(differs, ambiguous, tied))
            assert (traced is not None) == trace
            if traced is not None:
                assert_scored_alike(policy, request, server, traced, ~tied)
        return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))

    return run


def assert_scored_alike(
    policy: Policy, request: Request, server: ServerDecisions, traced: ServerTraces, rows: Tensor
) -> None:
    """The same candidates, and the same logprobs and accept logits up to rounding."""
    candidates = policy.candidates(server.logits, request.decoding)
    accept_logits = policy.accept_logits(server.hidden, candidates)[rows]
    in_nucleus = (candidates.logprobs > -torch.inf)[rows]
    token_ids, logprobs, server_logits = (column[rows] for column in traced)
    size = policy.config.max_candidates  # a neighbour may have more
    assert (logprobs[:, size:] == -torch.inf).all()
    assert torch.equal(logprobs[:, :size] > -torch.inf, in_nucleus)
    assert torch.equal(token_ids[:, :size][in_nucleus], candidates.token_ids[rows][in_nucleus])
    # Float32 sums of terms of size 1 in another order, and a bias of -60: some roundings of the result.
    tolerances = {"rtol": 1e-6, "atol": 1e-5}
    torch.testing.assert_close(logprobs[:, :size], candidates.logprobs[rows], **tolerances)
    torch.testing.assert_close(
        server_logits[:, :size][in_nucleus], accept_logits[in_nucleus], **tolerances
    )


@pytest.mark.parametrize("with_unproxied", [False, True], ids=["proxies", "proxies and plain rows"])
@pytest.mark.parametrize("trace", [False, True], ids=["loop", "traced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_trainer_and_server_decide_alike(compare, dtype, trace, with_unproxied):
    """Given the same logits, hidden states and noise, in batches that mix all proxies."""
    differs, ambiguous, tied = compare(dtype, trace=trace, with_unproxied=with_unproxied)
    assert ambiguous.sum() < 30
    assert (~tied & ~ambiguous).sum() > 1000  # of 3120; about half have ties in bf16
    assert not (differs & ~tied & ~ambiguous).any()


@pytest.mark.parametrize("trace", [False, True], ids=["loop", "traced"])
@torch.inference_mode()
def test_ties_are_decided_alike(compare, trace):
    differs, ambiguous, tied = compare(torch.bfloat16, trace=trace, with_unproxied=False)
    assert (tied & ~ambiguous).sum() > 500
    assert not (differs & tied & ~ambiguous).any()
