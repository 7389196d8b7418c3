"""The table of docs/results/proxy_rlhf.md: `python -m benchmarks.proxy_rlhf`.

All methods side by side on the bundled world, three training seeds each. What is done stays done: a run that was
stopped goes on where it was. `--scale 0.01` shows the path in minutes, with results that mean nothing.
"""

from benchmarks.comparison.jobs import command
from benchmarks.proxy_rlhf import report
from benchmarks.proxy_rlhf.plan import all_jobs

if __name__ == "__main__":
    command(__doc__, "benchmarks.proxy_rlhf", all_jobs, report.write)
