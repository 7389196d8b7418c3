"""Small proxies with strong opinions, and a pool that they can be put into."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxy.engine.assignment import Assignment
from proxy.engine.pool import ProxyPool, ServedProxy
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.noise import noise_key

H, V = 12, 40
EMBEDDINGS = torch.randn(V, H, generator=torch.Generator().manual_seed(0))  # the LLM's


class Proxy(NamedTuple):
    """A proxy in a pool, and the network that it was made from."""

    served: ServedProxy
    network: ProxyNetwork

    def score_single(self, hidden: Tensor, token_ids: Tensor, logprobs: Tensor) -> Tensor:
        """[R, H], [R, K] and [R, K] -> [R, K], by the network itself, without the pool."""
        return self.network(hidden, self.network.candidate_table(EMBEDDINGS)[token_ids], logprobs)


def random_network(seed: int, *, width: int = 6, **config: Any) -> ProxyNetwork:
    """A network with random weights that rejects about half of the candidates."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": H, "vocab_size": V, "width": width, "accept_bias": 0.0}
    network = ProxyNetwork(ProxyConfig(**(sizes | config)))
    torch.nn.init.normal_(network.score.weight, std=1.5)
    return network.requires_grad_(False)


def constant_network(accept_bias: float, **config: Any) -> ProxyNetwork:
    """A network whose accept logit is the same for every candidate."""
    network = random_network(0, **config)
    network.score.weight.zero_()
    network.score.bias.fill_(accept_bias)
    return network


def add_proxy(pool: ProxyPool, name: str, network: ProxyNetwork, version: str = "v1") -> Proxy:
    served = ServedProxy(name, version, network.config)
    pool.add(served, network.weights(), network.candidate_table(EMBEDDINGS))
    return Proxy(served, network)


def different_proxies(pool: ProxyPool) -> list[Proxy]:
    """Four proxies that differ in everything that may differ."""
    return [
        add_proxy(pool, "a", random_network(1, width=6, max_candidates=5, max_rejections=3)),
        add_proxy(
            pool,
            "b",
            random_network(
                2, width=16, max_candidates=12, max_rejections=1, temperature=0.7, top_p=0.9
            ),
        ),
        add_proxy(
            pool,
            "c",
            random_network(
                3, width=2, max_candidates=9, use_logprob=False, temperature=1.3, top_k=4
            ),
        ),
        add_proxy(pool, "d", random_network(4, width=9, max_candidates=64)),  # more than V
    ]


def every_setting(
    pool: ProxyPool, count: int, *, traced: bool, several: bool = False
) -> list[Assignment]:
    """Seeded requests with the pool's proxies and all kinds of settings, in turns of different lengths.

    `several`: some of them have one, two or all of the other proxies as partners.
    """
    proxies = pool.proxies

    def partners(row: int) -> tuple[tuple[ServedProxy, float], ...]:
        others = proxies[row % len(proxies) + 1 :] + proxies[: row % len(proxies)]
        strengths = (1.0, 0.4, 2.0)
        return tuple(zip(others[: row % 4], strengths, strict=False)) if several else ()

    return [
        Assignment(
            f"r{row}",
            proxies[row % len(proxies)],
            strength=(0.5, 1.0, 3.0)[row % 3],
            partners=partners(row),
            max_rejections=(8, 0, 1, 2, 3)[row % 5],
            temperature=(1.0, 0.6, 0.0)[row // 2 % 3],
            top_k=(0, 5, 0, proxies[0].config.vocab_size)[row % 4],
            top_p=(1.0, 0.95, 0.5)[row % 3],
            key=noise_key(row),
            is_seeded=True,
            traced=traced,
        )
        for row in range(count)
    ]
