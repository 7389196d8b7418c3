"""The API server's metrics on GET /metrics, beside vLLM's and the worker's (`proxy.engine.metrics`).

assent_verdicts_total{winner}           pairs judged by one principle; winner is a, b or tie
assent_judge_tokens_total{kind}         tokens spent on judging; kind is prompt or completion
assent_ranking_comparisons{strategy}    histogram: comparisons in a ranking, or readings of one-call
assent_best_of_samples_total            answers sampled for a tournament
assent_best_of_stopped_total            samples that were stopped because they had lost
assent_best_of_seconds                  histogram: from the request to the ranking
assent_requests_cancelled_total{path}   requests whose client disconnected before the end of the response
assent_proxy_changes_total{change}      change is loaded, unloaded or refused
assent_feedback_rows_total{source}      preferences kept; source is person or judge
assent_feedback_lost_total              verdicts and answers that could not be written

Of --learn, with all keys' own proxies under one name:
assent_learning_passes_total{proxy,result}  result is live, kept (what served before) or error
assent_learning_seconds_total{proxy}        their duration
assent_learning_verdicts{proxy}             verdicts used in the last pass
assent_learning_accuracy{proxy}             share of held-out verdicts that its proxy ordered correctly
assent_learning_kl{proxy}                   nats a token between its proxy and the frozen LLM
"""

from prometheus_client import Counter, Gauge, Histogram

from judge.protocol import Usage

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
    "From the request to the ranking.",
    buckets=(0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250),
)
CANCELLED = Counter(
    "assent_requests_cancelled", "Requests whose client disconnected before the end.", ["path"]
)
PROXY_CHANGES = Counter("assent_proxy_changes", "Loads and unloads of proxies.", ["change"])
BEST_OF_SAMPLES = Counter("assent_best_of_samples", "Answers sampled for a tournament.")
BEST_OF_STOPPED = Counter("assent_best_of_stopped", "Samples stopped because they had lost.")
FEEDBACK = Counter("assent_feedback_rows", "Preferences kept.", ["source"])
FEEDBACK_LOST = Counter("assent_feedback_lost", "Verdicts and answers that could not be written.")
LEARNING_PASSES = Counter("assent_learning_passes", "Passes over verdicts.", ["proxy", "result"])
LEARNING_SECONDS = Counter(
    "assent_learning_seconds", "Duration of passes over verdicts.", ["proxy"]
)


def _last_pass_gauge(name: str, text: str) -> Gauge:
    # Without this mode each process would export its own value; only the API server sets one.
    return Gauge(f"assent_learning_{name}", text, ["proxy"], multiprocess_mode="mostrecent")


LEARNING_VERDICTS = _last_pass_gauge("verdicts", "Verdicts used in the last pass.")
LEARNING_ACCURACY = _last_pass_gauge("accuracy", "Share of held-out verdicts ordered correctly.")
LEARNING_KL = _last_pass_gauge("kl", "KL to the frozen LLM in nats a token.")


def count_usage(usage: Usage) -> None:
    """Call once per judge, when it has finished."""
    JUDGE_TOKENS.labels("prompt").inc(usage.prompt_tokens)
    JUDGE_TOKENS.labels("completion").inc(usage.completion_tokens)
