"""The tables, the figures and the plot behind docs/results/self_judge.md: `python -m benchmarks.self_judge`.

Judges side by side on the bundled world, and what is trained by them, beside the published rows of
`benchmarks.proxy_rlhf`. What is done stays done: a run that was stopped goes on where it was, and the seeds that are
run are added to those in self_judge.json. `--scale 0.01` shows the path in minutes, with results that mean nothing.
"""

from benchmarks.comparison.jobs import command
from benchmarks.self_judge import report
from benchmarks.self_judge.plan import all_jobs

if __name__ == "__main__":
    command(__doc__, "benchmarks.self_judge", all_jobs, report.write)
