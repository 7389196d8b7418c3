"""The proxy: a small network that accepts or rejects what a frozen LLM proposes, token by token.

One line a module, in the order in which they are read best:

- `acceptance` - the law: logits, scores and noise in, one token per row out. Pure tensor functions.
- `exact`      - the same law in closed form: the probability of each token.
- `network`    - the network that scores the candidates of a row.
- `checkpoint` - a trained network on disk, tied to the LLM that it was trained for.
- `request`    - what a request may ask of it.
- `ledger`     - who is aligned by which proxy in the current batch, and what became of it.
- `metrics`    - the same for Prometheus, summed over requests.
- `sampler`    - the law in the place of vLLM's draw.
- `worker`     - vLLM's worker with that sampler, and the calls that load and unload proxies.

Only `sampler` and `worker` import vllm; importing this package imports nothing.
"""
