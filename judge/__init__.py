"""The judge: the LLM itself compares two finished responses, in both orders, one token a judgment.

Follows SELF-JUDGE (arXiv 2402.11253). Knows no engine: its user passes a tokenizer and a function
that reads two next-token log-probabilities. Imports neither torch nor vllm.

Data:

- `messages`      - chat messages in all of OpenAI's forms.
- `sources`       - rows of a file or a data set.
- `layouts`       - the layouts of public data.
- `rows`          - which rows are usable; the others are counted and reported.
- `feedback`      - preferences in a database.
- `feedback_tables` - its tables.

Judging:

- `principles`    - what to judge by: templates in a file.
- `prompts`       - the judge prompt, and how it is shortened.
- `verdict`       - label probabilities in both orders -> a verdict; verdicts by several principles -> a result.
- `protocol`      - the interface of a judge.
- `pairwise`      - the judge that reads both responses.
- `choice`        - a choice among N responses by one token.
- `scoring`       - judges that score each response:
- `likelihood`    - by a likelihood ratio, or a probe.
- `remote`        - judges on other servers: a reward model, or an LLM that reads both responses.
- `tournament`    - ranks N samples; its record can be replayed.
- `bradley_terry` - scores from probabilities of winning.

Commands:

- `options`       - options of all commands.
- `config_file`   - the YAML file of `--config`.
- `client`        - API key and error messages of commands that ask a running server.
- `functions`     - functions that a command line names as `module:function`.
- `evaluate`      - `python -m judge.evaluate`: how good is a judge?
- `measure`       - what proxies and best of N win and cost on a running server.
- `plan`          - `python -m judge.plan`: proxy, best of N, or both?
"""
