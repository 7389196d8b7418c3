"""The table of docs/results/proxy_rlhf.md: `python -m benchmarks.proxy_rlhf`.

All methods compared on the toy data, with three training seeds each. Finished jobs are not repeated: a stopped run
continues where it was. `--scale 0.01` runs the path in minutes, with meaningless results.
"""

from benchmarks.comparison.jobs import command
from benchmarks.proxy_rlhf import report
from benchmarks.proxy_rlhf.plan import all_jobs

if __name__ == "__main__":
    command(__doc__, "benchmarks.proxy_rlhf", all_jobs, report.write)
