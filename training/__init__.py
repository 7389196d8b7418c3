"""Offline commands that produce what the server loads, and the modules that they are built from. One line a module.

Commands, `python -m training.NAME`, in the order of a project:

- `demo`            - the bundled demo, from nothing.
- `base_model`      - a small untrained Llama, for machines that cannot download a model.
- `prepare`         - checks preference pairs and sets some aside.
- `export`          - feedback that the server kept, as preference data.
- `sft`             - supervised fine-tuning.
- `jsft`            - supervised fine-tuning on answers and judgments: one model learns to answer and to judge.
- `reward_model`    - a reward from preference pairs: scalar, implicit, whose LoRA is also a judge, or a probe.
- `dpo`             - direct preference optimisation of the LLM, a baseline.
- `estimate`        - memory and time of training a proxy.
- `proxy_ppo`       - a proxy with PPO (Proxy-RLHF).
- `proxy_dpo`       - a proxy with DPO on preferences.
- `rlhf_ppo`        - full RLHF, a baseline.
- `self_judge`      - self-training with the model's own judgments (SELF-JUDGE).
- `evaluate`        - a proxy against the frozen LLM on held-out prompts.

Rollouts:

- `policy`               - the sampling policy: the frozen LLM under a decoding, with or without a proxy.
- `rollout`              - samples responses with transformers and records the proxy's decisions.
- `rollout_backends`     - the protocol of the backends, and the options that choose one.
- `rollout_transformers` - the transformers backend.
- `rollout_vllm`         - the vLLM backend, in this process.
- `rollout_worker`       - vLLM's workers for it, which keep hidden states.
- `rollout_servers`      - the servers backend.
- `server_requests`      - its requests to one server.
- `servers`              - distributes requests to several servers, some of which may fail.
- `traces`               - what both vLLM backends read from traces.

Learning from rollouts:

- `prompts`         - prompts as the LLM reads them.
- `on_policy`       - base class and loop of trainers that learn from their own samples.
- `ppo_trainer`     - base class of the PPO trainers.
- `ppo`             - the formulas of PPO, as pure functions.
- `rewards`         - rewards: scores of finished responses.
- `reward_loading`  - loads the reward that `--reward` names.
- `model_judge`     - the pairwise judge on a model in this process.
- `pair_judges`     - judges of pairs: models by principles, or rewards by their scores.

Learning from preferences:

- `preferences`       - pairs and single verdicts.
- `preference_report` - what is printed about them.
- `ranked_answers`    - preferences from an LLM's own answers, ranked by a reward.
- `part_cache`        - what one pass of the frozen LLM yields, on disk.
- `positions`         - hidden states and candidates of given responses, read once and kept.
- `probe`             - a linear head on the frozen LLM's hidden states.
- `probe_fit`         - its fit and cross-validation.
- `coherence`         - a probe of what makes sense, without labels; it is added to a probe or any reward.
- `mean_states`       - hidden states averaged over given responses.
- `preference_losses` - DPO, IPO, SimPO and KTO on the distribution that accept/reject sampling emits.
- `direct`            - fits a proxy to recorded positions.

Beside a server:

- `learner`         - the process of `python -m server --learn`.
- `learning`        - fits a proxy to the kept verdicts and tests whether it may serve.
- `verdicts`        - which verdicts count.

Data and models:

- `blind`           - answers without labels, for whoever judges them.
- `data`            - rows, as `judge.rows` reads them.
- `conversations`   - chats as token ids.
- `judgments`       - judgment examples from preference pairs.
- `pairs`           - preference pairs as token ids, and as a model's inputs.
- `packing`         - several responses to one prompt as one sequence.
- `models`          - loads models and tokenizers.
- `adapters`        - a LoRA on the frozen LLM, on or off per call.
- `model_inputs`    - batches of token ids as a model's inputs.
- `logprobs`        - log-probabilities without the logits of a whole batch.
- `supervised`      - training on sequences with a weight per token.
- `pair_trainer`    - training on pairs: DPO, the implicit and the scalar reward.
- `micro_batches`   - a batch in parts that fit the memory.
- `memory`          - how many tokens fit at once.
- `machine`         - the memory that the machine has.
- `sizes`           - formulas for an LLM's memory and operations.

Runs:

- `console`         - errors of the user in one line, exit code 2.
- `output`          - the output directory of a run.
- `output_checks`   - what is refused before anything is written.
- `run_marker`      - `assent_run.json`, by which a run is recognised.
- `card_texts`      - what model cards say of each kind.
- `model_card`      - the model card of any directory that holds a proxy, reward, judge or model.
- `publish`         - uploads a finished run to the Hub.
- `run_card`        - the model card of a run.
- `run_options`     - where a run's metrics and its result go.
- `trackers`        - the trackers of `--report-to`.
- `saving`          - saves a directory as a whole.
- `checkpoints`     - resumes runs of transformers' trainer.
- `state`           - resumes the other runs.
- `metrics`         - a run's metrics and curves.

`toy_data` is the bundled data set with its reference scorer; `world` is the name of the command that writes it.
"""

import sys
from types import TracebackType


def _report_interrupt(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted: nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Python is still looking for the command, whose imports take seconds. After them `console` handles Ctrl-C.
if sys.argv[:1] == ["-m"]:
    sys.excepthook = _report_interrupt
