"""The tables, metrics and plots of docs/results/self_judge.md: `python -m benchmarks.self_judge`.

Compares judges on the toy data, and models trained by them, with the published rows of `benchmarks.proxy_rlhf`.
Finished jobs are not repeated: a stopped run continues where it was, and new seeds are added to those in
self_judge.json. `--scale 0.01` runs the path in minutes, with meaningless results.
"""

from benchmarks.comparison.jobs import command
from benchmarks.self_judge import report
from benchmarks.self_judge.plan import all_jobs

if __name__ == "__main__":
    command(__doc__, "benchmarks.self_judge", all_jobs, report.write)
