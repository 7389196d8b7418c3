"""The judge: the LLM itself compares two finished answers, in both orders, one token a judgment.

Follows SELF-JUDGE (arXiv 2402.11253). Knows nothing of engines: whoever uses it hands over a
tokenizer and a function that reads two next-token log-probabilities. Imports neither torch nor
vllm. One line a module:

- `prompts`    - the chat that asks for a judgment, and the tokens that answer it.
- `verdict`    - what the answers in both orders say about a pair.
- `tournament` - a knock-out over N samples, with a receipt that replays.
- `judge`      - pairs in, verdicts out, over any engine.
"""
