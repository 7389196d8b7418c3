"""The proxy: a small network that accepts or rejects the tokens that a frozen LLM proposes.

The algorithm, which the engine, the trainer and the judge share:

- `acceptance`     - accept/reject sampling: logits, scores and noise in, one token per row out.
- `noise`          - its random numbers: fresh, or from a request's seed.
- `exact`          - the same in closed form: the probability of each token.
- `network`        - the network that scores the candidates of a row.
- `checkpoint`     - a trained network on disk, with the fingerprint of its LLM.
- `hub`            - checkpoints on the Hub: `org/repo@revision` as a directory.
- `reward_file`    - `reward.json`: what a reward or judge on disk is, and its LLM.
- `probe`          - a linear head on the LLM's hidden states: a reward, and a judge.
- `likelihood`     - how much likelier responses are with a proxy: a reward, and a judge.
- `positions`      - the positions of responses where a proxy has a choice.
- `position_store` - these on disk, for a server that learns.
- `learned`        - versions that a server learns, on disk.
- `request`        - what a request may ask of a proxy, and what the worker answers.

In vLLM:

- `worker`         - vLLM's workers with proxies, and the calls that load and unload them.

`engine/` has everything behind the worker, `cpu/` and `gpu/` the compiled kernels. Importing this package
imports nothing.
"""
