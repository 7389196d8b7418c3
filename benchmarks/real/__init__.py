"""All methods on a real LLM and real human preferences; `docs/results/real.md` describes the comparison.

- `setting`    - options, sizes and what all methods share.
- `data`       - the parts of the pairs and of the prompts.
- `methods`    - the rows of the table.
- `rewards`    - jobs that train rewards, judges and second opinions.
- `trainings`  - jobs that train methods.
- `policies`   - a method's policy in memory, and its answers.
- `opinions`   - scores of answers: the reward that was trained on, and opinions that no training saw.
- `words`      - the opinion that reads an answer's words alone.
- `texts`      - what the text of an answer shows by rule: refusal, compliance, repetition.
- `evaluation` - jobs that search a decoding, and that answer the test prompts.
- `plan`       - all jobs.
- `report`, `tables` - figures and tables.
- `blind`      - answers without labels, to be judged by people.
"""
