"""Accept/reject sampling has the enumerated distribution, on tensors and in the real engine, for all settings.

Each test raises a false alarm with probability below 1e-6 (`tests.proxy.references`), and seeds are fixed. The controls
show that the same counts reject the distributions of other settings.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from proxy.acceptance import decide, nucleus
from proxy.checkpoint import identify, save
from proxy.engine.sampler_v1 import ProxySampler
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.noise import draw_noise, noise_key, seeded_noise
from tests.proxy.references import (
    AmbiguousError,
    Outcome,
    Setting,
    accept_logits_of,
    assert_follows,
    canonical,
    least_p_value,
    token_distribution,
    with_ties,
)

Distribution = dict[Outcome, float]


def random_setting(rng: np.random.Generator) -> Setting:
    """All options at random, some of them off."""
    options = {
        "temperature": rng.choice([0.3, 0.7, 1.0, 1.0, 1.4, 2.0]),
        "top_k": rng.choice([0, 0, 0, 0, 1, 4, 6, 40]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.8, 0.5]),
        "min_p": rng.choice([0.0, 0.0, 0.0, 0.05, 0.2]),
        "strength": rng.choice([0.5, 1.0, 1.0, 3.0]),
        "max_rejections": rng.choice([0, 1, 2, 2, 3, 8, 8, 8]),
    }
    return Setting(**{name: value.item() for name, value in options.items()})


# --- the tensor functions ---


def joint_logits(costs: np.ndarray) -> list[float]:
    """Accept logits of the product of P proxies' probabilities, from their -log: [P, K] -> [K]."""
    return (-np.log(np.expm1(costs.sum(0)))).tolist()


class Kind(NamedTuple):
    """One kind of row: its logits [V], and the accept logits of up to three proxies by token [3, V]."""

    logits: np.ndarray
    scores: np.ndarray
    strengths: tuple[float, float, float]  # 0 = the row does not have this proxy
    setting: Setting
    distribution: Distribution


def random_kinds(count: int, vocab_size: int = 30) -> list[Kind]:
    """Rows of all kinds whose distribution is unambiguous; many have tied bf16 logits."""
    rng = np.random.default_rng(11)
    kinds: list[Kind] = []
    for i in itertools.count():
        if len(kinds) == count:
            break
        logits = rng.normal(0, 2, vocab_size).astype(np.float32)
        if i % 3 == 0:
            logits = torch.tensor(logits * 3).bfloat16().float().numpy()
            best, second, third, fourth, *_ = np.argsort(-logits)
            logits[second], logits[fourth] = logits[best], logits[third]
        scores = rng.normal(0, 1.5, (3, vocab_size)) - (40.0 if i % 8 == 5 else 0.0)
        setting = random_setting(rng)._replace(
            max_candidates=int(rng.choice([1, 3, 5, 6, 8])),
            trained_temperature=float(rng.choice([0.7, 1.0, 1.0, 1.3])),
        )
        if i % 7 == 0:
            setting = setting._replace(temperature=0.0)
        elif setting.min_p:  # vLLM applies it before
            floor = logits.max() + setting.trained_temperature * np.log(setting.min_p)
            logits = np.where(logits >= floor, logits, -np.inf)

        strengths = (setting.strength, *((0.0, 0.0), (0.7, 0.0), (1.0, 2.0))[i % 3])

        def accept_logits(
            ids: list[int], _: list[float], scores=scores, strengths=strengths
        ) -> list[float]:
            costs = np.array(strengths)[:, None] * np.logaddexp(0, -scores[:, ids])
            return joint_logits(costs)

        try:
            distribution = token_distribution(logits, setting._replace(strength=1.0), accept_logits)
        except AmbiguousError:
            continue
        kinds.append(Kind(logits, scores, strengths, setting, distribution))
    return kinds


def decide_mixed(kinds: list[Kind], repeats: int) -> list[Counter[Outcome]]:
    """`repeats` rows of every kind in one call; odd rows with seeded noise."""
    rows = len(kinds) * repeats
    by_row = [kind for _ in range(repeats) for kind in kinds]
    logits = torch.tensor(np.stack([kind.logits for kind in by_row]))
    scores = torch.tensor(np.stack([kind.scores for kind in by_row])).float()

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(kind.setting, name) for kind in by_row])

    greedy = column("temperature") == 0
    top_k_off = logits.shape[1]
    top_k, top_p = column("top_k"), column("top_p")
    sizes = column("max_candidates")
    candidates = nucleus(
        logits,
        int(sizes.max()),
        torch.where((top_k == 0) | greedy, top_k_off, top_k),
        top_p.masked_fill(greedy, 1.0),
        temperature=column("trained_temperature"),
        sizes=sizes,
    )
    torch.manual_seed(12)
    keys = torch.tensor([noise_key(row // len(kinds)) for row in range(rows)])
    noise = draw_noise(rows, candidates.token_ids.shape[1], "cpu")
    is_seeded = torch.arange(rows) // len(kinds) % 2 == 1
    seeded = seeded_noise(keys, torch.full((rows,), 70), candidates.token_ids)
    token_ids = candidates.token_ids.unsqueeze(1).expand(-1, 3, -1)
    decision = decide(
        candidates,
        scores.gather(-1, token_ids),
        torch.where(is_seeded.view(-1, 1, 1), seeded, noise),
        strength=torch.tensor([kind.strengths for kind in by_row]),
        max_rejections=column("max_rejections"),
        sharpness=column("trained_temperature") / column("temperature").masked_fill(greedy, 1.0),
        greedy=greedy,
    )
    outcomes = zip(*decision.columns[1:].tolist(), strict=True)
    counts: list[Counter[Outcome]] = [Counter() for _ in kinds]
    for row, outcome in enumerate(outcomes):
        counts[row % len(kinds)][canonical(outcome, by_row[row].logits)] += 1
    return counts


def test_a_batch_of_unlike_rows_follows_the_enumerated_law():
    """Each row its own scores, K, max_rejections, temperature, top-k, top-p, min-p, and one to three proxies."""
    kinds = random_kinds(72)
    assert sum(len(kind.distribution) == 1 for kind in kinds) > 5
    assert any(
        prob > 0.5 and forced for kind in kinds for (*_, forced), prob in kind.distribution.items()
    )
    for kind, counts in zip(kinds, decide_mixed(kinds, repeats=4000), strict=True):
        assert_follows(counts, kind.distribution, tests=len(kinds))


# --- vLLM's V1 sampler in the real engine ---

VOCAB_SIZE = 288
PROMPTS = ((5,), (7, 80, 9), (200, 11, 40, 41), (33, 34))
REQUESTS_AT_ONCE = 4000  # the worker keeps the counts of 4096
# Widths, K and the decodings of their training differ; "never" rejects everything; "hot" shares its temperature.
PROXIES: dict[str, dict[str, Any]] = {
    "wide": {"width": 64, "max_candidates": 8, "temperature": 0.8, "top_k": 6, "top_p": 0.9},
    "narrow": {"width": 16, "max_candidates": 5, "use_logprob": False, "temperature": 1.3},
    "never": {"width": 8, "max_candidates": 6, "accept_bias": -60.0},
    "hot": {"width": 24, "max_candidates": 9, "temperature": 1.3, "top_k": 7, "top_p": 0.94},
}


def trained_with(*names: str) -> dict[str, Any]:
    """The fields of a `Setting` that depend on the proxies: the narrowest of each."""
    configs = [PROXIES[name] for name in names]
    fields: dict[str, Any] = {"max_candidates": min(c["max_candidates"] for c in configs)}
    for name in ("temperature", "top_k", "top_p"):
        if values := [config[name] for config in configs if name in config]:
            fields[f"trained_{name}"] = min(values)
    return fields


class Request(NamedTuple):
    """One kind of request, for one token."""

    prompt: tuple[int, ...]
    proxy: str | None
    setting: Setting
    trace: bool = False
    partner: str | None = None

    @property
    def strengths(self) -> dict[str, float]:
        """The partner has half of the proxy's strength."""
        own = {} if self.proxy is None else {self.proxy: self.setting.strength}
        return own | ({} if self.partner is None else {self.partner: self.setting.strength / 2})

    @property
    def is_aligned(self) -> bool:
        return self.proxy is not None and self.setting.strength > 0

    @property
    def num_repeats(self) -> int:
        """Few where the result does not depend on noise."""
        setting = self.setting
        is_certain = 0 in (setting.temperature, setting.max_rejections) or setting.top_k == 1
        return 40 if is_certain else 1000

    def params(self, seed: int | None) -> Any:
        from vllm import SamplingParams

        setting, extra_args = self.setting, None
        if self.proxy is not None:
            proxies: dict[str, Any] = {"proxy": self.proxy, "strength": setting.strength}
            if self.partner is not None:
                proxies = {"proxies": self.strengths}
            limits = {"max_rejections": setting.max_rejections, "trace": self.trace}
            extra_args = {"alignment": proxies | limits}
        return SamplingParams(
            temperature=setting.temperature,
            top_k=setting.top_k,
            top_p=setting.top_p,
            min_p=setting.min_p,
            seed=seed,
            max_tokens=1,
            detokenize=False,
            extra_args=extra_args,
        )


class Observation(NamedTuple):
    """The outcome of a request in the engine, and the hook's inputs if they are recorded."""

    outcome: Outcome
    logits: Tensor  # [V], or [0]
    hidden: Tensor  # [H], or [0]


@pytest.fixture(scope="module")
def networks() -> dict[str, ProxyNetwork]:
    by_name = {}
    for seed, (name, config) in enumerate(PROXIES.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 64, "vocab_size": VOCAB_SIZE, "accept_bias": 0.0}
        by_name[name] = ProxyNetwork(ProxyConfig(**sizes | config))
        torch.nn.init.normal_(by_name[name].score.weight, std=1.5)
    return by_name


@pytest.fixture(scope="module")
def make_aligned(make_llm, model_dir, networks, tmp_path_factory) -> Callable[[str], Any]:
    """An engine of this dtype that takes hundreds of requests at once, all proxies loaded."""
    root = tmp_path_factory.mktemp("proxies")
    for name, network in networks.items():
        save(root / name, network, base=identify(str(model_dir)), training={})

    def make(dtype: str) -> Any:
        llm = make_llm(
            worker_cls="proxy.worker.ProxyCPUWorker",
            dtype=dtype,
            max_num_seqs=512,
            max_num_batched_tokens=4096,
            kv_cache_memory_bytes=128 << 20,
        )
        for name in networks:
            llm.collective_rpc("load_proxy", args=(name, str(root / name)))
        return llm

    return make


@pytest.fixture(scope="module")
def frozen(model_dir) -> Any:
    """The LLM in transformers, in double precision."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


def random_requests(*, mixed: bool = False, trace: bool = False) -> list[Request]:
    """Requests of every kind. `mixed`: some without a proxy, some with a min-p; these take another path."""
    rng = np.random.default_rng(75)
    requests = []
    for i in range(28):
        name = ("wide", "narrow", "wide", "narrow", "never")[i % 5]
        partner = "hot" if i % 5 == 3 else None
        names = [name] if partner is None else [name, partner]
        setting = random_setting(rng)._replace(**trained_with(*names))
        proxy: str | None = name
        if i % 7 == 0:
            setting = setting._replace(temperature=0.0)
        if not mixed:
            setting = setting._replace(min_p=0.0)
        elif i % 9 == 1:  # the frozen LLM: all of its tokens, and the first proposal stands
            setting = setting._replace(
                strength=0.0,
                max_rejections=1,
                max_candidates=VOCAB_SIZE,
                trained_temperature=setting.temperature or 1.0,
            )
            proxy, partner = None if i % 2 else proxy, None
        requests.append(Request(PROMPTS[i % len(PROMPTS)], proxy, setting, trace, partner))
    return requests


def generate_often(
    llm: Any, requests: list[Request], monkeypatch: pytest.MonkeyPatch, *, tie: bool = False
) -> list[list[Observation]]:
    """Send every request many times, shuffled into common batches; every other one has a seed.

    `tie`: the logits are tied before the sampler gets them, and recorded.
    """
    recorded: dict[str, tuple[Tensor, Tensor]] = {}
    original = ProxySampler.forward

    def forward(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tie and self.step is not None:
            logits = with_ties(logits)
            rows = zip(logits.float().clone(), self.step.hidden.clone(), strict=True)
            ids = [req_id.rsplit("-", 1)[0] for req_id in self.step.plan.req_ids]
            recorded.update(zip(ids, rows, strict=True))
        return original(self, logits, *args, **kwargs)

    monkeypatch.setattr(ProxySampler, "forward", forward)
    torch.manual_seed(15)  # the engine, in this process, draws from it
    repeats = [request.num_repeats for request in requests]
    order = np.random.default_rng(14).permutation(np.repeat(np.arange(len(requests)), repeats))
    not_recorded = torch.empty(0), torch.empty(0)
    observations: list[list[Observation]] = [[] for _ in requests]
    for start in range(0, len(order), REQUESTS_AT_ONCE):
        batch = order[start : start + REQUESTS_AT_ONCE].tolist()
        prompts = [{"prompt_token_ids": list(requests[i].prompt)} for i in batch]
        params = [requests[i].params(n if n % 2 else None) for n, i in enumerate(batch, start)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        ids = [output.request_id for output in outputs]
        (counts,) = llm.collective_rpc("take_alignment_counts", args=(ids,))
        by_id = {req_id.rsplit("-", 1)[0]: count for req_id, count in counts.items()}
        for i, output in zip(batch, outputs, strict=True):
            (token_id,) = output.outputs[0].token_ids
            unproxied_count = {"proposed": 1, "forced": 0}  # no proxy: the first proposal stands
            count = by_id.pop(output.request_id) if requests[i].is_aligned else unproxied_count
            outcome = (token_id, count["proposed"], bool(count["forced"]))
            observations[i].append(
                Observation(outcome, *recorded.get(output.request_id, not_recorded))
            )
        assert not by_id
        recorded.clear()
    return observations


def distribution_of(
    request: Request,
    logits: Tensor,  # [V]
    hidden: Tensor,  # [H]
    embeddings: Tensor,  # [V, H]
    networks: dict[str, ProxyNetwork],
) -> Distribution:
    def accept_logits(token_ids: list[int], logprobs: list[float]) -> list[float]:
        scores = {
            name: np.array(
                accept_logits_of(networks[name], hidden, embeddings, token_ids, logprobs)
            )
            for name in request.strengths
        }
        if request.partner is None:
            return scores[request.proxy].tolist() if request.proxy else [0.0] * len(token_ids)
        costs = [
            strength * np.logaddexp(0, -scores[name])
            for name, strength in request.strengths.items()
        ]
        return joint_logits(np.array(costs))

    setting = request.setting
    if request.partner is not None:
        setting = setting._replace(strength=1.0)
    return token_distribution(logits.double().numpy(), setting, accept_logits)


@torch.no_grad()
def expected_distributions(
    requests: list[Request], frozen: Any, networks: Any
) -> list[Distribution | None]:
    """From transformers' logits and hidden states; None where more than one distribution would be correct."""
    distributions: list[Distribution | None] = []
    embeddings = frozen.get_input_embeddings().weight
    for request in requests:
        output = frozen(torch.tensor([request.prompt]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0, -1]
        try:
            distributions.append(
                distribution_of(request, output.logits[0, -1], hidden, embeddings, networks)
            )
        except AmbiguousError:
            distributions.append(None)
    return distributions


@pytest.mark.parametrize(
    "path",
    [{}, {"mixed": True}, {"trace": True}],
    ids=["logits untouched", "beside rows without a proxy and min-p", "traced"],
)
def test_the_engine_follows_the_enumerated_law(
    make_aligned, frozen, networks, monkeypatch, path: dict[str, bool]
):
    """Tokens and counts of requests of all kinds in common batches, seeded and not."""
    requests = random_requests(**path)
    distributions = expected_distributions(requests, frozen, networks)
    assert None not in distributions
    counts = [
        Counter(observation.outcome for observation in observations)
        for observations in generate_often(make_aligned("float32"), requests, monkeypatch)
    ]
    for count, distribution in zip(counts, distributions, strict=True):
        assert_follows(count, distribution, tests=len(requests))
    # The control: for every option, the counts of some request reject the distribution with another value of it.
    changes: dict[str, Callable[[Any], Any]] = {
        "temperature": lambda x: x * 2,
        "top_k": lambda x: 3,
        "top_p": lambda x: x / 2,
        "strength": lambda x: x * 2 + 1,
        "max_rejections": lambda x: x + 1,
        "max_candidates": lambda x: 4,
        "trained_temperature": lambda x: x / 2,
        "trained_top_k": lambda x: 1,
        **({"min_p": lambda x: 0.5} if path.get("mixed") else {}),
    }
    for option, change in changes.items():
        values = []
        for request, count in zip(requests, counts, strict=True):
            if request.is_aligned:
                changed = {option: change(getattr(request.setting, option))}
                changed_request = request._replace(setting=request.setting._replace(**changed))
                (distribution,) = expected_distributions([changed_request], frozen, networks)
                values += [] if distribution is None else [least_p_value(count, distribution)]
        assert min(values) < 1e-12, option


def test_the_engine_follows_the_law_of_tied_bf16_logits(
    make_aligned, networks, model_dir, monkeypatch
):
    """The expected distributions use the hook's own logits and hidden states."""
    from safetensors.torch import load_file

    embeddings = load_file(model_dir / "model.safetensors")["model.embed_tokens.weight"].bfloat16()
    requests = random_requests(mixed=True)
    groups: dict[tuple[int, bytes], list[Observation]] = defaultdict(list)
    for i, observations in enumerate(
        generate_often(make_aligned("bfloat16"), requests, monkeypatch, tie=True)
    ):
        for observation in observations:
            groups[i, observation.logits.numpy().tobytes()].append(observation)
    num_tied, num_followed = 0, 0
    for (i, _), observations in groups.items():
        logits = observations[0].logits
        try:
            distribution = distribution_of(
                requests[i], logits, observations[0].hidden, embeddings, networks
            )
        except AmbiguousError:
            continue
        values = [logits[token].item() for token in {token for token, _, _ in distribution}]
        num_tied += len({*values}) < len(values)
        num_followed += len(observations)
        counts = Counter(
            canonical(observation.outcome, logits.numpy()) for observation in observations
        )
        assert_follows(counts, distribution, tests=len(groups))
    assert num_tied >= 3
    assert num_followed > sum(map(len, groups.values())) / 2
