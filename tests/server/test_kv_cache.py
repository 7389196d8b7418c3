"""The memory of a server on a CPU: its share of the free memory, and the effect of the user's own options."""

import json
import shutil

import pytest

from tests.server.conftest import DEMO

GIB = 1024**3
MODEL = DEMO / "model"
WEIGHTS = 7_077_368  # bytes of its safetensors
BLOCK = 32 * 4096  # tokens · keys and values of 4 layers, 4 heads, 64 numbers of 2 bytes


@pytest.fixture
def plan(monkeypatch):
    """The memory plan of a machine with 128 GiB."""
    from server import arguments, kv_cache

    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)

    def plan(*flags, model=MODEL, free=64 * GIB):
        monkeypatch.setattr(kv_cache, "free_and_total", lambda: (free, 128 * GIB))
        args = arguments.parse(["--model", str(model), *flags])
        memory = kv_cache.plan_memory(args)
        kv_cache.prefer_cache(args)
        return memory, args.kv_cache_memory_bytes

    return plan


def long_model(directory):
    """The demo's model, with a context of 131,072 tokens."""
    model = directory / "long"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    config["max_position_embeddings"] = 131_072
    (model / "config.json").write_text(json.dumps(config))
    return model


def test_room_for_all_that_runs_at_once(plan):
    memory, cache_bytes = plan()
    assert (memory.weights, memory.workers, memory.problem()) == (WEIGHTS, 1, None)
    assert cache_bytes == memory.cache == (128 * 512 // 32 + 1) * BLOCK
    assert plan("--max-num-seqs", "4")[1] == (4 * 512 // 32 + 1) * BLOCK
    assert plan("--max-num-seqs", "4", "--max-model-len", "256")[1] == (4 * 256 // 32 + 1) * BLOCK


def test_and_for_the_longest_request(plan, tmp_path):
    model = long_model(tmp_path)
    memory, cache_bytes = plan("--max-num-seqs", "4", model=model)
    assert cache_bytes == memory.longest == (4096 + 1) * BLOCK
    assert memory.problem() is None
    assert plan("--max-num-seqs", "4", "--max-model-len", "300", model=model)[1] == (38 + 1) * BLOCK


def test_a_share_of_what_is_free(plan):
    memory, cache_bytes = plan("--max-num-seqs", "4096", free=4 * GIB)
    assert cache_bytes == memory.cache == int(0.8 * (4 * GIB - WEIGHTS - memory.processes))
    assert memory.problem() is None


def test_too_little_is_free(plan, tmp_path):
    memory, _ = plan(free=GIB)
    assert "more than is free" in memory.problem()
    memory, cache_bytes = plan(model=long_model(tmp_path), free=memory.processes + GIB // 4)
    assert cache_bytes == memory.longest  # vLLM decides: layers with a window take less
    assert "--max-model-len" in memory.problem()


def test_the_users_choice(plan, monkeypatch, tmp_path):
    memory, cache_bytes = plan("--kv-cache-memory-bytes", "1G")
    assert memory.cache == cache_bytes == GIB
    memory, _ = plan("--kv-cache-memory-bytes", "200M", model=long_model(tmp_path))
    assert "--kv-cache-memory-bytes" in memory.problem()
    memory, cache_bytes = plan("--gpu-memory-utilization", "0.25")
    assert cache_bytes is None and 30 * GIB < memory.cache < 32 * GIB
    assert "more than is free" in plan("--gpu-memory-utilization", "0.75")[0].problem()
    assert plan("--block-size", "64")[1] == (128 * 512 // 64 + 1) * 2 * BLOCK
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    memory, cache_bytes = plan()
    assert cache_bytes is None and memory.cache == 2 * GIB


def test_engines_share_it(plan):
    memory, cache_bytes = plan("--data-parallel-size", "2")
    assert memory.workers == 2 and memory.cache == 2 * cache_bytes == 2 * (4 * 512 + 1) * BLOCK


def test_a_variable_that_is_no_number(plan, monkeypatch):
    from server.arguments import StartupError

    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2G")
    with pytest.raises(StartupError, match="GiB"):
        plan()


def test_a_hub_id_that_is_not_here_yet():
    from server import arguments, kv_cache

    assert kv_cache.weight_bytes(arguments.parse(["--model", "nobody/nothing"])) == 0
