"""Offline commands that make what the server loads, and what they are made of. One line a module.

Commands, `python -m training.NAME`, in the order of a project:

- `demo`            - the bundled demo, from nothing.
- `base_model`      - a small untrained Llama, where no model can be downloaded.
- `prepare`         - checks preference pairs and sets some aside.
- `export`          - kept feedback as preference data.
- `sft`             - supervised fine-tuning.
- `jsft`            - the same with judgments: one model learns to answer and to judge.
- `reward_model`    - a reward from preference pairs: scalar, or implicit, whose LoRA is a judge too.
- `dpo`             - direct preference optimisation, a baseline.
- `estimate`        - what training a proxy will take in memory and time.
- `proxy_ppo`       - the proxy (Proxy-RLHF).
- `proxy_dpo`       - the proxy straight from preferences.
- `rlhf_ppo`        - full RLHF, a baseline.
- `self_judge`      - self-training by the model's own judgment (SELF-JUDGE).
- `evaluate`        - a proxy beside the frozen LLM, on held-out prompts.

Rollouts and learning from them:

- `policy`          - who decides what is said.
- `rollout`         - responses from transformers, every decision of the proxy recorded.
- `rollout_vllm`    - the same from vLLM, in this process.
- `rollout_worker`  - vLLM's workers that keep what the proxy reads.
- `rollout_servers` - the same from running servers.
- `servers`         - several servers asked at once, some of which may fail.
- `traces`          - what rollouts in vLLM have in common.
- `engines`         - which of these samples.
- `rewards`         - scores of finished responses.
- `judging`         - the judge on a model in this process.
- `judges`          - who says which of two responses is better.
- `ppo`             - the pieces of PPO, as pure functions.
- `online`          - what the PPO commands share.
- `updates`         - the loop around updates from own samples.

Straight from preferences:

- `preferences`       - what is preferred to what: pairs and single verdicts.
- `ranked_answers`    - the same, of an LLM's own answers that a reward ranks.
- `positions`         - hidden states and candidates of given responses, read once and kept.
- `preference_losses` - DPO, IPO, SimPO and KTO, of what accept/reject sampling emits.
- `direct`            - gradient steps.

Beside a server:

- `learner`         - the process of `python -m server --learn`.
- `learning`        - a proxy of kept verdicts, and whether it may serve.
- `verdicts`        - which verdicts count.

Data, models, runs:

- `data`            - rows, as `judge.rows` reads them.
- `judgments`       - judgments to learn, from preference pairs.
- `models`          - models, tokenizers, chats as they read them.
- `supervised`      - training on sequences with a weight per token.
- `pairs`           - preference pairs as token ids, and as a model's inputs.
- `pair_trainer`    - training on them: DPO, the implicit and the scalar reward.
- `logprobs`        - log-probabilities without whole logits.
- `micro_batches`   - a batch in parts that fit the memory.
- `memory`          - how many tokens these are: what training takes.
- `machine`         - and what there is.
- `sizes`           - formulas for memory and operations of an LLM.
- `checkpoints`     - a killed run of transformers' trainer goes on.
- `state`           - and so does one of ours.
- `output`          - what a command writes: nothing is destroyed, an unfinished run is known again.
- `saving`          - a directory is saved whole.
- `metrics`         - a run's figures and curves.
- `console`         - errors of the user's: one line, exit code 2.

`world` is the bundled world: prompts, answers, preferences, and the gold scorer that grades them.
"""

import sys
from types import TracebackType


def _say_interrupted(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted: nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == [
    "-m"
]:  # Python looks for a command, whose imports take seconds; `console` guards the rest
    sys.excepthook = _say_interrupted
