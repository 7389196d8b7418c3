"""The LLMs of the benchmarks: the bundled demo, SmolLM2, and one with half a billion random parameters.

The large one has the sizes of Qwen2-0.5B. Its output is meaningless, but the cost of its steps does not depend on that.
It is created on first use, in a few seconds, and kept.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from deploy.demo.smollm2.convert import model_directory
from proxy.checkpoint import identify, save
from proxy.network import ProxyConfig, ProxyNetwork

REPOSITORY = Path(__file__).parents[1]
DEMO = REPOSITORY / "deploy" / "demo"
CACHE = REPOSITORY / "runs" / "benchmarks"

ModelName = Literal["demo", "smollm2", "large"]


@dataclass(frozen=True)
class Model:
    """An LLM with a proxy, and the size of its KV cache."""

    name: str
    directory: Path
    tokenizer: Path
    proxy: Path
    kv_cache_bytes: int
    """Enough for 64 of the longest requests that are measured."""
    num_words: int = 0
    """Prompts are drawn from the words t0, t1, ... t<num_words − 1>, one token each; 0 = from the tokenizer's own
    tokens.
    """


def get_model(name: ModelName, cache: Path = CACHE) -> Model:
    """The model; the large one is created if it does not exist."""
    if name == "demo":
        directory = DEMO / "model"
        return Model("demo", directory, directory, DEMO / "proxies" / "aligned", 256 << 20)
    if name == "smollm2":
        directory = model_directory()
        return Model(name, directory, directory, DEMO / "smollm2" / "proxies" / "plain", 1 << 29)
    directory, tokenizer, proxy = (
        cache / "large" / part for part in ("model", "tokenizer", "proxy")
    )
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    if not (proxy / "config.json").is_file():  # written last
        _make_tokenizer(tokenizer, config.vocab_size)
        _make_llm(directory, config)
        make_proxy(proxy, directory, max_candidates=32)
    return Model("large", directory, tokenizer, proxy, 1 << 30, config.vocab_size)


def make_proxy(directory: Path, model: Path, *, seed: int = 0, **settings: Any) -> None:
    """Save a proxy with random weights for the LLM in `model`; `settings` go into its `ProxyConfig`."""
    config = AutoConfig.from_pretrained(model)
    torch.manual_seed(seed)
    network = ProxyNetwork(
        ProxyConfig(hidden_size=config.hidden_size, vocab_size=config.vocab_size, **settings)
    )
    torch.nn.init.normal_(network.score.weight, std=1.0)  # so that candidates differ
    save(directory, network, base=identify(str(model)), training={})


def _make_tokenizer(directory: Path, vocab_size: int) -> None:
    """A word for every token. In the LLM's directory transformers would take it for a Qwen2 tokenizer."""
    vocabulary = {f"t{i}": i for i in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="t1",
        pad_token="t1",
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    ).save_pretrained(directory)
    # Not a Qwen2 tokenizer. Without any config vLLM searches for one and complains.
    (directory / "config.json").write_text('{"model_type": "gpt2"}\n', encoding="utf-8")


def _make_llm(directory: Path, config: Qwen2Config) -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(4.0)  # logits of standard deviation 2.4, not 0.6
    model.save_pretrained(directory)
