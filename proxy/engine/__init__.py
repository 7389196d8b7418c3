"""The proxies inside vLLM's engine. `proxy.worker` is the door: vLLM and the server call nothing else.

One step, in this order:

- `runner`          - what vLLM's model runner (V1 or V2) knows of the step.
- `request_tracker` - the requests in hand, and the batch's plan.
- `assignment`      - how one request is sampled.
- `batch_plan`      - how the rows of one batch are sampled, until the batch changes.
- `sampler_v1`      - vLLM's sampler with accept/reject sampling in the place of its draw.
- `sampler_v2`      - the same for Model Runner V2.
- `rejection_v1`    - vLLM's verification of drafted tokens, with the rows that proxies decide.
- `rejection_v2`    - the same for Model Runner V2.
- `drafts`          - the rows of a step with drafts, and which of the decided tokens are emitted.
- `hook`            - what both samplers do with the logits of one step.
- `rows`            - the rows that proxies decide.
- `scoring`         - accept logits of rows with any mix of proxies, in one evaluation.
- `decision_stats`  - counts of what was decided.
- `traces`          - which candidates were proposed and rejected, token by token.
- `metrics`         - the counts for Prometheus.

Beside the steps:

- `registry`        - which proxies are loaded: names, versions, shadows.
- `pool`            - their tensors, stacked on the device.
- `reading`         - positions or scores of given responses, kept during their prefill.
- `embeddings`      - candidate tables from the LLM's embeddings.
- `ranks`           - calls that end alike on all tensor-parallel ranks.
- `device`          - copies between host and device that wait for nothing.
- `unsupported`     - features of vLLM that are refused at start-up.
- `lora_cpu`        - a correction of vLLM's LoRA on a CPU.
- `drafts_cpu`      - corrections of vLLM's speculative decoding on a CPU.
- `parent_watch`    - ends the engine when its server was killed.

Only `runner`, the samplers, `rejection_v1`, `rejection_v2`, `embeddings`, `ranks`, `lora_cpu`, `drafts_cpu`
and `proxy.worker` import vllm.
"""
