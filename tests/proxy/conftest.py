"""A tiny LLM with random weights, and vLLM engines that serve it in this process."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HIDDEN_SIZE = 64
VOCAB_SIZE = 288  # 256 bytes, a few merges, special tokens


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a byte-level tokenizer; its logits are spread like a trained model's."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["the cat sat on the mat and the dog sat on the cat while a hat lay on that mat"] * 4
    tokenizer.train_from_iterator(text, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.25)  # logits of standard deviation 2
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def make_llm(model_dir: Path) -> Iterator[Callable[..., Any]]:
    """The engine with these keyword arguments for `vllm.LLM`, and small buffers otherwise.

    Engines live as long as the module: they share vLLM's process-wide groups, and the first to stop would destroy them.
    Afterwards vLLM's changes to the process are undone as far as possible.
    """
    import torch._dynamo

    environment = dict(os.environ)
    no_compilation = torch._dynamo.config.patch(disable=True)  # logprobs would compile a kernel
    with pytest.MonkeyPatch.context() as patch, no_compilation:
        # In-process engines start in seconds and can be inspected.
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        patch.setattr(torch, "set_num_threads", torch.set_num_threads)  # the worker disables it
        from vllm import LLM
        from vllm.distributed import cleanup_dist_env_and_memory

        engines: dict[str, Any] = {}

        def make(**kwargs: Any) -> Any:
            settings: dict[str, Any] = {
                "model": str(model_dir),
                "dtype": "float32",
                "max_model_len": 512,
                "max_num_seqs": 16,
                "max_num_batched_tokens": 512,
                "enforce_eager": True,
                "kv_cache_memory_bytes": 16 << 20,
                "disable_log_stats": True,
                "seed": 0,
            }
            settings |= kwargs
            if (key := repr(sorted(settings.items()))) not in engines:
                engines[key] = LLM(**settings)
            return engines[key]

        yield make
        # vLLM collects garbage twice for each engine, half a second each time. Once for all engines is enough.
        patch.setattr(gc, "collect", lambda generation=2: 0)
        engines.clear()
        cleanup_dist_env_and_memory()
    gc.collect()
    os.environ.clear()
    os.environ.update(environment)
