"""The judge's counters on GET /metrics, beside vLLM's and the worker's (`proxy.metrics`).

assent_verdicts_total{winner}      pairs judged by one principle; winner is a, b or tie
assent_judge_tokens_total{kind}    tokens spent on judging; kind is prompt or completion
assent_best_of_samples_total       answers sampled for a tournament
assent_feedback_rows_total{source} preferences kept; source is person or judge
assent_feedback_lost_total         verdicts and answers that could not be kept
"""

from prometheus_client import Counter

from judge.judge import Usage

VERDICTS = Counter("assent_verdicts", "Pairs judged by one principle.", ["winner"])
JUDGE_TOKENS = Counter("assent_judge_tokens", "Tokens spent on judging.", ["kind"])
BEST_OF_SAMPLES = Counter("assent_best_of_samples", "Answers sampled for a tournament.")
FEEDBACK = Counter("assent_feedback_rows", "Preferences kept.", ["source"])
FEEDBACK_LOST = Counter("assent_feedback_lost", "Verdicts and answers that could not be kept.")


def count_usage(usage: Usage) -> None:
    """Call once per judge, when it has finished."""
    JUDGE_TOKENS.labels("prompt").inc(usage.prompt_tokens)
    JUDGE_TOKENS.labels("completion").inc(usage.completion_tokens)
