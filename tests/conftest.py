"""How the tests run: one thread a process, every test with the same random numbers, and what is started is shared.

Under pytest-xdist (`make test`) the tests of a file stay on one worker. So do those of a directory whose files share a
server, which is then started once.
"""

import functools
import gc
import os
import random
import signal
import ssl
import sys
from typing import Any

import pytest

# One thread for one engine: with more of them than free cores, vLLM's CPU build collapses at random. Before torch is
# imported, and for all processes that tests start. The tests pass with any number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A thread that waits for another gives up its core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell that starts the tests in the background has all that they start ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A missing file is an error. It is not downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
# `httpx.get` and its like read all certificates for each request. The tests speak plain HTTP.
vars(ssl)["create_default_context"] = functools.cache(ssl.create_default_context)

# Directories whose files share a server, but for files that are named below and use none of it.
SHARED = ("tests/server",)
# What takes 20 s or more, the longest first: the other workers would wait for it at the end. A tuple, for every worker
# has to find the same order.
LONG = (
    "tests/server", "tests/training/test_proxy_ppo.py", "tests/server/test_kill.py",
    "tests/deploy/test_monitoring.py", "tests/server/test_judge_adapters.py",
    "tests/training/test_architectures.py", "tests/server/test_features.py",
    "tests/training/test_align_your_model.py", "tests/server/test_survival.py",
    "tests/proxy/test_exactness.py", "tests/training/test_rollout_servers.py",
    "tests/proxy/test_architectures.py", "tests/training/test_rlhf_ppo.py",
    "tests/training/test_publish.py", "tests/training/test_checkpoints.py",
    "tests/training/test_decides_alike.py", "tests/training/test_pair_judges.py",
    "tests/proxy/test_hub.py", "tests/proxy/test_worker.py",
    "tests/benchmarks/test_proxy_rlhf.py", "tests/training/test_proxy_dpo.py",
    "tests/deploy/test_smollm2.py", "tests/proxy/test_kernel.py",
    "tests/server/test_data_parallel.py", "tests/deploy/test_balancer.py",
)  # fmt: skip


def group_of(nodeid: str) -> str:
    """The directory or file whose tests stay on one worker."""
    file = nodeid.partition("::")[0]
    directory = file.rpartition("/")[0]
    return directory if directory in SHARED and file not in LONG else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first, so that the workers end at about the same time."""
    order = {group: rank for rank, group in enumerate(LONG)}

    def rank(item: pytest.Item) -> int:
        return order.get(group_of(item.nodeid), len(order))

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Leave the modules out of garbage collections: Accelerate and vLLM often ask for one, and it takes a second."""
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before fixtures
def pytest_runtest_setup() -> None:
    """Seed the generators, so that a test draws the same numbers whichever tests ran before it."""
    random.seed(0)
    for name, seed in (("numpy.random", "seed"), ("torch", "manual_seed")):
        if name in sys.modules:
            getattr(sys.modules[name], seed)(0)
