"""Write the toy data: `python -m training.world --output DIR --seed N`.

Files, all JSON lines in TRL's conversational format:

- `sft.jsonl`: `{"messages"}`, answers of the data's imperfect speaker
- `preferences.jsonl`: `{"prompt", "chosen", "rejected"}`, Bradley–Terry draws on differences of the reference score
- `preferences_manners.jsonl`: the same, for answers that differ in manners only
- `judgments.jsonl`: pairs that each differ by one `principle`, with `rationale_chosen` and `rationale_rejected`
- `principles.json`: the text of the principles
- `prompts.jsonl`: `{"prompt"}` for reinforcement learning

Two disjoint held-out splits use topic × intent combinations that occur in none of the files above: validation, for
choosing settings, and test, for reporting results. Each has `prompts_`, `preferences_` and `judgments_` files:
`prompts_validation.jsonl`, `prompts_test.jsonl` and so on.
"""

from training.console import main_guard, read_options
from training.toy_data.files import Options, main

if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
