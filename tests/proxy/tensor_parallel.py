"""An engine over two tensor-parallel ranks on the CPU, with each rank's tokens and answers.

test_tensor_parallel.py runs it in a process group of its own. By hand, from the repository's root:

    python -m tests.proxy.tensor_parallel /tmp/observed.json

Needs VLLM_ENABLE_V1_MULTIPROCESSING=0: the ranks' processes are then children of this one.
"""

import json
import os
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from proxy.engine.sampler_v1 import ProxySampler
from proxy.network import ProxyNetwork
from proxy.worker import ProxyCPUWorker
from tests.proxy.architectures import ARCHITECTURES, make_model, make_proxy, recorded_calls

MAX_NEW_TOKENS = 24
PROMPT_LENGTHS = [5, 40, 3, 120, 17, 9, 64]
ONE, TWO = {"proxy": "one"}, {"proxy": "two"}

# (the request's alignment fields, its sampling parameters)
REQUESTS: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    (None, {}),
    (None, {"seed": 1, "top_p": 0.9}),
    (None, {"temperature": 0.0}),
    (None, {"top_p": 0.8, "top_k": 20}),
    (ONE, {}),
    (ONE, {"top_p": 0.9, "temperature": 1.3}),
    (ONE, {"seed": 2}),
    (ONE, {"temperature": 0.0}),
    (TWO | {"strength": 2.0}, {}),
    (TWO | {"strength": 0.5}, {"seed": 3, "top_k": 5, "top_p": 0.95}),
    (TWO | {"max_rejections": 0}, {"min_p": 0.05}),
    (TWO | {"max_rejections": 1}, {"seed": 4, "min_p": 0.02, "repetition_penalty": 1.2}),
]

_NETWORK = "proxy.network.ProxyNetwork"


class RecordingWorker(ProxyCPUWorker):
    """Records the tokens that its rank samples. Its calls make the ranks differ."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._drawn: list[tuple[list[str], list[bool], list[int]]] = []
        original = ProxySampler.forward

        def forward(sampler: ProxySampler, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = original(sampler, logits, *args, **kwargs)
            sampled = output.sampled_token_ids.squeeze(-1)
            runner = self.model_runner
            unfinished = runner.discard_request_mask.np[: len(logits)].tolist()
            self._drawn.append((list(runner.input_batch.req_ids), unfinished, sampled.tolist()))
            return output

        patch.object(ProxySampler, "forward", forward).start()

    def take_drawn(self) -> list[tuple[list[str], list[bool], list[int]]]:
        """(request ids, is the prefill unfinished, token) of the rows of each step since the last call."""
        drawn, self._drawn = self._drawn, []
        return drawn

    def table_error(self, name: str, directory: str, trainer_table: list[list[float]]) -> float:
        """Load a proxy. Returns the largest difference of this rank's table from the trainer's."""
        with recorded_calls(ProxyNetwork, "candidate_table") as chunks:
            self.load_proxy(name, directory)
        return (torch.cat(chunks) - torch.tensor(trainer_table)).abs().max().item()

    def enter(self, rank: int, directory: str) -> None:
        """Change the working directory of that rank."""
        if self.rank == rank:
            os.chdir(directory)

    def load_without_room(self, rank: int, part: str, name: str, directory: str) -> Any:
        """`load_proxy`, during which that rank has no memory left for that part of the load."""
        targets = {"read": "proxy.worker.load", "table": f"{_NETWORK}.candidate_table"}
        no_room = patch(targets[part], side_effect=MemoryError("no room"))
        with no_room if self.rank == rank else nullcontext():
            return self.load_proxy(name, directory)

    def reseed(self) -> None:
        """Make the ranks' random numbers differ."""
        torch.manual_seed(self.rank)


def generate(llm: Any, vocab_size: int) -> dict[str, Any]:
    """Serve all requests at once. Returns each rank's tokens and the outputs."""
    from vllm import SamplingParams

    rng = torch.Generator().manual_seed(1)
    lengths = [PROMPT_LENGTHS[i % len(PROMPT_LENGTHS)] for i in range(len(REQUESTS))]
    prompts = [
        torch.randint(2, vocab_size, (length,), generator=rng).tolist() for length in lengths
    ]
    params = [
        SamplingParams(
            max_tokens=MAX_NEW_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if alignment is None else {"alignment": alignment},
            **kwargs,
        )
        for alignment, kwargs in REQUESTS
    ]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    ids = [output.request_id for output in outputs]
    return {
        "ids": ids,
        "texts": [list(output.outputs[0].token_ids) for output in outputs],
        "drawn": llm.collective_rpc("take_drawn"),
        "counts": llm.collective_rpc("take_alignment_counts", args=(ids,)),
    }


def fail_to_load(llm: Any, method: str, *args: Any) -> dict[str, Any]:
    """The answers to an attempt to load a proxy "half", and to the calls after it."""
    return {
        "load": attempt(llm, method, *args),
        "list": attempt(llm, "list_proxies"),
        "unload": attempt(llm, "unload_proxy", "half"),
    }


def attempt(llm: Any, method: str, *args: Any) -> Any:
    """The ranks' answers, or the error as text."""
    try:
        return llm.collective_rpc(method, args=args)
    except Exception as error:
        return str(error)


def observe(directory: Path) -> dict[str, Any]:
    """All values that the tests check."""
    from vllm import LLM

    # An odd vocabulary: the ranks' halves are padded.
    model = make_model(ARCHITECTURES["llama, odd vocabulary"], directory)
    network = make_proxy(model, directory)
    vocab_size = network.config.vocab_size
    llm = LLM(
        str(directory),
        worker_cls="tests.proxy.tensor_parallel.RecordingWorker",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=96,
        enforce_eager=True,
        kv_cache_memory_bytes=16 << 20,
        disable_log_stats=True,
        seed=0,
    )
    table = network.candidate_table(model.get_input_embeddings().weight).tolist()
    observed = {
        "table_errors": llm.collective_rpc(
            "table_error", args=("one", str(directory / "proxy"), table)
        ),
        "loaded": llm.collective_rpc("load_proxy", args=("two", str(directory / "proxy"))),
        "together": generate(llm, vocab_size),
    }
    observed["failures"] = {}
    (directory / "elsewhere").mkdir()
    for rank in (0, 1):
        llm.collective_rpc("enter", args=(rank, str(directory / "elsewhere")))
        llm.collective_rpc("enter", args=(1 - rank, str(directory)))
        observed["failures"][f"rank {rank} finds no checkpoint"] = fail_to_load(
            llm, "load_proxy", "half", "proxy"
        )
        for part in ("read", "table"):
            observed["failures"][f"rank {rank} has no room: {part}"] = fail_to_load(
                llm, "load_without_room", rank, part, "half", str(directory / "proxy")
            )
    observed["after_failures"] = generate(llm, vocab_size)
    llm.collective_rpc("reseed")
    observed["apart"] = generate(llm, vocab_size)
    return observed


def main(results: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(results).write_text(json.dumps(observe(Path(directory))))


if __name__ == "__main__":
    main(*sys.argv[1:])
