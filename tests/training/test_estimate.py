"""The formulas of the estimate against tensors and operations counted in real runs of small models."""

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from proxy.network import ProxyNetwork
from tests.training.memory import TensorBytes
from tests.training.models import ARCHITECTURES, data_rows, save_model
from training import estimate, proxy_ppo
from training.adapters import lora_config
from training.console import TrainingError
from training.estimate import Options, proxy_of, trained
from training.logprobs import add_logprobs
from training.models import load_model
from training.policy import Decoding, Policy, default_config
from training.rewards import sequence_logprobs
from training.rollout import generate
from training.sizes import (
    Sizes,
    activation_bytes,
    cache_bytes,
    decision_bytes,
    float32_bytes,
    forward_flops,
    sizes_of,
)

QWEN = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
N, PROMPT, RESPONSE = 4, 30, 8
PEAK_TOLERANCE = 0.05  # relative: masks, rotary angles and the like are not in the formulas
DTYPES = [torch.float32, torch.bfloat16]


def config_dir(directory: Path, config: dict[str, Any]) -> str:
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def test_the_sizes_of_7b_models(tmp_path: Path) -> None:
    """As the models' cards and papers have them."""
    qwen = sizes_of(config_dir(tmp_path, QWEN))
    assert qwen.parameters == 7_615_616_512
    assert cache_bytes(qwen, rows=1, tokens=1, size=2) == 57_344
    llama = sizes_of(config_dir(tmp_path, LLAMA))
    assert llama.parameters == 6_738_415_616
    assert cache_bytes(llama, rows=1, tokens=1, size=2) == 524_288


def test_what_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # one line a row of the table
    model = config_dir(tmp_path, LLAMA)
    sizes, large_options = sizes_of(model), Options(model=model, prompt_tokens=1024, batch_size=256)
    assert estimate.estimate(sizes, Options(model=model)).peak < 0.9 * large_options.memory
    estimate.main(large_options)
    printed = " ".join(capsys.readouterr().out.split())
    assert "proxy_ppo does not fit 80 GB, a tenth kept free: it will lower --batch-size" in printed
    assert "does not fit with a single pair" in printed  # all weights
    assert "32768 tokens at once" in printed  # a LoRA
    result = estimate.estimate(sizes_of(model), Options(model=model, reward="implicit"))
    assert result.staying["frozen LLM"] == result.staying["reward model"] == 2 * 6_738_415_616
    with pytest.raises(TrainingError, match="cannot read the config"):
        sizes_of(str(tmp_path / "none"))


@pytest.mark.slow  # modules of two 7 B models; test_what_fits makes one
def test_the_table_of_the_recipe(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "seven-b.md").read_text()
    results, loras = [], []
    for config in (QWEN, LLAMA):
        options = Options(config_dir(tmp_path, config), response_tokens=256, steps=200)
        results.append(estimate.estimate(sizes_of(options.model), options))
        planned, needed = next(iter(trained(options).values()))
        assert planned is not None
        loras.append(needed.of(planned.tokens))
    for name, figures in {
        "**`proxy_ppo` at most**": [f"**{result.peak / 1e9:.1f}**" for result in results],
        "**`reward_model` at most**": [f"**{num_bytes / 1e9:.1f}**" for num_bytes in loras],
        "rollout, in addition": [f"{result.phases['rollout'] / 1e9:.1f}" for result in results],
        "writing the responses": [f"{result.seconds['responses']:.1f}" for result in results],
        "**an update**": [f"**{sum(result.seconds.values()):.0f}**" for result in results],
        "**the LoRA**": [f"**{result.lora_seconds / 3600:.1f} h**" for result in results],
    }.items():
        assert f"| {name} | {figures[0]} | {figures[1]} |" in page
    vllm_peaks = [
        estimate.estimate(
            sizes_of(config_dir(tmp_path, config)),
            Options(str(tmp_path), response_tokens=256, steps=200, rollout="vllm"),
        ).peak
        / 1e9
        for config in (QWEN, LLAMA)
    ]
    expected = f"{vllm_peaks[0]:.1f} GB at most for Qwen2.5-7B, {vllm_peaks[1]:.1f} for Llama-2-7B"
    assert expected in " ".join(page.split())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    save_model(request.param, directory)
    return directory


def is_gemma2(directory: Path) -> bool:
    return directory.name.startswith("gemma2")


def test_a_rollouts_operations_and_bytes(model_dir: Path) -> None:
    sizes, (model, _) = sizes_of(str(model_dir)), load_model(str(model_dir), "eager")
    assert sum(parameter.nbytes for parameter in model.parameters()) == 4 * sizes.parameters
    caches = []
    model.register_forward_hook(lambda *call: caches.append(call[2].past_key_values))
    prompts = [[7 + row] * PROMPT for row in range(N)]
    decoding = Decoding(max_new_tokens=RESPONSE)
    with FlopCounterMode(display=False) as counter:
        rollout = generate(Policy(model.eval()), prompts, decoding, end_ids=(), seeds=count(0))
    # The last token is not read.
    flops = forward_flops(sizes, N, PROMPT, PROMPT, 1) + sum(
        forward_flops(sizes, N, 1, PROMPT + step, 1) for step in range(1, RESPONSE)
    )
    cache = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[-1].layers)
    expected_cache = cache_bytes(sizes, N, PROMPT + RESPONSE - 1, 4)
    if is_gemma2(model_dir):  # a sliding window in every other layer
        assert 0.97 * flops < counter.get_total_flops() < flops
        assert expected_cache / 2 < cache < expected_cache
    else:
        assert counter.get_total_flops() == flops
        assert cache == expected_cache
    assert len(rollout.decisions.token_ids) == 0  # there is no proxy
    proxied = Policy(model, ProxyNetwork(default_config(model, width=4)))
    decisions = generate(proxied, prompts, decoding, end_ids=(), seeds=count(0)).decisions
    assert len(decisions.token_ids) >= N * RESPONSE
    recorded = sum(column.nbytes for column in decisions)
    assert recorded == decision_bytes(sizes, len(decisions.token_ids), 4)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")  # peft corrects it
def test_a_loras_parameters(model_dir: Path) -> None:
    sizes, (model, _) = sizes_of(str(model_dir)), load_model(str(model_dir))
    num_trained = get_peft_model(model, lora_config(3)).get_nb_trainable_parameters()[0]
    assert num_trained == 3 * sizes.lora


# So wide that the formulas cover nearly all tensors.
WIDE = [
    LlamaConfig(
        hidden_size=128, intermediate_size=344, num_hidden_layers=3, num_attention_heads=2, vocab_size=999
    ),
    Qwen2Config(
        hidden_size=128, intermediate_size=676, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, vocab_size=5001,
    ),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", WIDE, ids=lambda config: config.model_type)
def test_the_peak_of_a_forward(config: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    add_logprobs(model)
    config.save_pretrained(tmp_path)
    sizes, size, rows, tokens, num_positions = sizes_of(str(tmp_path)), dtype.itemsize, 8, 64, 33
    ids = torch.randint(0, 900, (rows, tokens))
    with torch.no_grad(), TensorBytes() as prefill:
        model(ids, use_cache=True, logits_to_keep=1)
    cache = cache_bytes(sizes, rows, tokens, size)
    activations = activation_bytes(sizes, rows * tokens, size)
    assert prefill.peak == pytest.approx(cache + activations, rel=PEAK_TOLERANCE)
    prompts = [row[: tokens - num_positions + 1] for row in ids.tolist()]
    responses = [row[tokens - num_positions + 1 :] for row in ids.tolist()]
    with TensorBytes() as reward:
        sequence_logprobs(model, prompts, responses, rows)
    # Inside log-softmax, which is not counted.
    log_softmax_bytes = 4 * rows * (num_positions - 1) * config.vocab_size
    logits = float32_bytes(rows * (num_positions - 1) * config.vocab_size, size) - log_softmax_bytes
    # The tokens' hidden states are beside them.
    assert reward.peak == pytest.approx(max(activations, logits), rel=2 * PEAK_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("response", "phase"), [(4, "rollout"), (48, "update")])
def test_the_peak_of_an_update(tmp_path: Path, response: int, phase: str, dtype: Any) -> None:
    save_model("llama", tmp_path)  # for its tokenizer
    config = LlamaConfig.from_pretrained(tmp_path, hidden_size=256, intermediate_size=688)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    rows = "".join(json.dumps(row) + "\n" for row in data_rows("prompts", 1))
    (tmp_path / "prompts.jsonl").write_text(rows)
    options = proxy_ppo.Options(
        model=str(tmp_path),
        reward="tests.training.models:length",
        prompts=str(tmp_path / "prompts.jsonl"),
        output=tmp_path,
        episodes=24,
        batch_size=12,
        decoding=Decoding(max_new_tokens=response),
        dtype=dtype,
        width=8,
    )
    trainer = proxy_ppo.ProxyPPOTrainer(options, Accelerator(cpu=True))
    trainer.step(0)  # makes gradients and Adam's moments
    with TensorBytes() as tensor_bytes:
        row = trainer.step(1)
    result = estimate.estimate(
        sizes_of(str(tmp_path)),
        Options(
            model=str(tmp_path),
            prompt_tokens=len(trainer.prompts[0].ids),
            response_tokens=response,
            episodes=24,
            batch_size=12,
            width=8,
            decisions_per_token=row["decisions"] / (24 * response),
            reward="none",
            dtype=dtype,
        ),
    )
    assert max(result.phases, key=result.phases.__getitem__) == phase
    expected = result.staying["recorded decisions"] + result.phases[phase]
    assert tensor_bytes.peak == pytest.approx(expected, rel=0.15)


def test_the_proxys_parameters() -> None:
    sizes = Sizes(0, 0, 0, 0, hidden=8, intermediate=0, query=0, key=0, vocab=50)
    # two halves, the mix, its score, and the value's two layers
    assert proxy_of(sizes, 4).num_parameters() == 2 * 8 * 4 + (9 * 4 + 4) + 5 + (8 * 2 + 2) + 3
