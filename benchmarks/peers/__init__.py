"""Assent beside its peers, in quality, time, tokens and set-up; `docs/results/peers.md` describes the comparison.

- `setting`       - options and sizes.
- `worlds`        - the two worlds: LLM, proxy, prompts, grader.
- `rows`          - the rows of the tables.
- `engine`        - the engine that all serving rows share, and requests to Assent.
- `environments`  - the peers' packages, each in an environment of its own.
- `optillm`, `its_hub` - requests to these peers; `its_hub_worker` runs in its_hub's environment.
- `decoders`      - what the methods in transformers share.
- `reference`     - the frozen LLM, the proxy and best of N there.
- `args`, `cards`, `genarm` - three published methods, written small from their papers.
- `lab`           - a world in transformers: reward, guide, constants.
- `trained_judge` - of SmolLM2's world, beside the LLM itself.
- `timing`        - timed rounds.
- `plan`          - all jobs.
- `report`, `tables` - figures and tables.
"""
