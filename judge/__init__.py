"""The judge: the LLM itself compares two finished answers, in both orders, one token a judgment.

Follows SELF-JUDGE (arXiv 2402.11253). Knows nothing of engines: whoever uses it hands over a
tokenizer and a function that reads two next-token log-probabilities. Imports neither torch nor
vllm. One line a module:

- `messages`      - chat messages in all their forms.
- `sources`       - rows of a file or a data set.
- `layouts`       - public data in TRL's formats.
- `rows`          - which rows can be used, and what becomes of the others.
- `principles`    - what to judge by, from a file that anybody may write.
- `prompts`       - the chat that asks for a judgment, and how it is cut where it is too long.
- `verdict`       - what the answers in both orders, and by several principles, say about a pair.
- `judge`         - questions in, rulings out, over any engine.
- `likelihood`    - the second kind of judge: a response's score is a ratio of two likelihoods.
- `tournament`    - strategies that rank N samples, with a receipt that replays.
- `bradley_terry` - scores from probabilities of winning.
- `feedback`      - preferences that are kept, in any database.
- `options`       - options of all commands: bounds of their numbers, `~`.
- `evaluate`      - `python -m judge.evaluate`: how good is a judge?
- `plan`          - `python -m judge.plan`: proxy, best of N, or both?
"""
