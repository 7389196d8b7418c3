"""The API server's metrics on GET /metrics, beside vLLM's and the worker's (`proxy.engine.metrics`).

assent_verdicts_total{winner}           pairs judged by one principle; winner is a, b or tie
assent_judge_tokens_total{kind}         tokens spent on judging; kind is prompt or completion
assent_ranking_comparisons{strategy}    histogram: comparisons in a ranking
assent_best_of_samples_total            answers sampled for a tournament
assent_best_of_seconds                  histogram: from the request to the choice
assent_requests_cancelled_total{path}   requests whose client went before the end of the answer
assent_proxy_changes_total{change}      change is loaded, unloaded or refused
assent_feedback_rows_total{source}      preferences kept; source is person or judge
assent_feedback_lost_total              verdicts and answers that could not be kept

of --learn, with all keys' own proxies under one name:
assent_learning_passes_total{proxy,result}  result is live, kept (what served before) or error
assent_learning_seconds_total{proxy}        that they took
assent_learning_verdicts{proxy}             that counted in the last pass
assent_learning_accuracy{proxy}             share of unseen verdicts that its proxy ordered rightly
assent_learning_kl{proxy}                   nats a token between its proxy and the frozen LLM
"""

from prometheus_client import Counter, Gauge, Histogram

from judge.judge import Usage

VERDICTS = Counter("assent_verdicts", "Pairs judged by one principle.", ["winner"])
JUDGE_TOKENS = Counter("assent_judge_tokens", "Tokens spent on judging.", ["kind"])
COMPARISONS = Histogram(
    "assent_ranking_comparisons",
    "Comparisons in a ranking.",
    ["strategy"],
    buckets=(1, 3, 7, 15, 31, 63, 127, 255, 511, 1023, 2047),
)
BEST_OF_SECONDS = Histogram(
    "assent_best_of_seconds",
    "From the request to the choice.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
)
CANCELLED = Counter(
    "assent_requests_cancelled", "Requests whose client went before the end.", ["path"]
)
PROXY_CHANGES = Counter("assent_proxy_changes", "Loads and unloads of proxies.", ["change"])
BEST_OF_SAMPLES = Counter("assent_best_of_samples", "Answers sampled for a tournament.")
FEEDBACK = Counter("assent_feedback_rows", "Preferences kept.", ["source"])
FEEDBACK_LOST = Counter("assent_feedback_lost", "Verdicts and answers that could not be kept.")
LEARNING_PASSES = Counter("assent_learning_passes", "Passes over verdicts.", ["proxy", "result"])
LEARNING_SECONDS = Counter("assent_learning_seconds", "That passes over verdicts took.", ["proxy"])


def _of_last_pass(name: str, text: str) -> Gauge:
    # Without the mode each process has a figure of its own; only the API server has any.
    return Gauge(f"assent_learning_{name}", text, ["proxy"], multiprocess_mode="mostrecent")


LEARNING_VERDICTS = _of_last_pass("verdicts", "That counted in the last pass.")
LEARNING_ACCURACY = _of_last_pass("accuracy", "Share of unseen verdicts ordered rightly.")
LEARNING_KL = _of_last_pass("kl", "KL to the frozen LLM in nats a token.")


def count_usage(usage: Usage) -> None:
    """Call once per judge, when it has finished."""
    JUDGE_TOKENS.labels("prompt").inc(usage.prompt_tokens)
    JUDGE_TOKENS.labels("completion").inc(usage.completion_tokens)
