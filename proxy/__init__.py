"""The proxy: a small network that accepts or rejects what a frozen LLM proposes, token by token.

One line a module, in the order in which they are read best. The law and the network:

- `acceptance` - the law: logits, scores and noise in, one token per row out. Pure tensor functions.
- `exact`      - the same law in closed form: the probability of each token.
- `network`    - the network that scores the candidates of a row.
- `checkpoint` - a trained network on disk, tied to the LLM that it was trained for.
- `reward_file` - `reward.json`: what a reward or judge on disk is, and its LLM.
- `likelihood` - how much likelier a proxy makes responses: a reward, and a judge.
- `learned`    - versions that a server learns, on disk.
- `request`    - what a request may ask of it.
- `positions`  - where responses left a proxy a choice: what it is trained on directly.
- `position_store` - these, kept for a server that learns.

In the engine:

- `hook`       - what happens to the logits of one step.
- `plan`       - how the rows of one batch are sampled, until the batch changes.
- `ledger`     - which requests follow which proxy, and their plan.
- `rows`       - the rows that proxies decide, one evaluation for all.
- `pool`       - all loaded proxies side by side on the device.
- `registry`   - which proxies these are: names, versions, shadows.
- `history`    - what became of aligned tokens, by request and by proxy.
- `metrics`    - the same for Prometheus.
- `reading`    - positions of given responses, kept as their prefill goes by.
- `loop`       - the law on a CPU, compiled, one row after another.
- `loop_rows`  - a plan's rows as that loop wants them.
- `sampler`    - the hook in the place of the draw of vLLM's sampler.
- `sampler_v2` - likewise in Model Runner V2.
- `worker`     - vLLM's workers with that sampler, and the calls that load and unload proxies.
- `lora_cpu`   - vLLM's LoRA on a CPU, mended.
- `orphan`     - the end of an engine whose server was killed.

Only the samplers, `worker` and `lora_cpu` import vllm; importing this package imports nothing.
"""
