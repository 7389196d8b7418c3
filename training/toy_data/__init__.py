"""Toy data: a grammar of short English dialogues with known flaws, and a reference scorer that finds those flaws.

Everything can be trained from it without a download, and results can be graded exactly. The rest of `training` does not
depend on it: `training.demo` writes the data, and `training.evaluate` loads the scorer where no reward is named.

- `lexicon`          - topics, objects, advice and hazards.
- `intents`          - kinds of requests, templates of answers, rates of flaws.
- `grammar`          - prompts, and answers with chosen flaws.
- `reference_scorer` - reads the flaws off an answer's text.
- `principles`       - principles that match the flaws, with rationales.
- `files`            - the data files (`python -m training.world`).
- `grading`          - win rates and rates of flaws by the reference scorer.
"""
