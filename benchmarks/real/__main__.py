"""The tables of docs/results/real.md: all methods on a real LLM and real human preferences.

    python -m benchmarks.real --pairs hh-rlhf-harmless-base-test.jsonl.gz --helpful-pairs llmbar.jsonl --model DIR

Finished jobs are not repeated: a stopped run continues where it was, and rewards that are there are used again.
`--scale 0.02` runs the path in minutes, with meaningless results; `--methods` runs some rows of the table.
"""

import os

from benchmarks.comparison.jobs import run
from benchmarks.real import blind, report
from benchmarks.real.plan import all_jobs
from benchmarks.real.setting import Options, setting_of
from training.console import main_guard, read_options


def main(options: Options) -> None:
    # By itself vLLM binds its threads to all cores, and the jobs would share the first.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    setting = setting_of(options)
    if run(options, setting, all_jobs(setting), "benchmarks.real"):
        report.write(setting, options.output)
        blind.write(setting)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
