"""What the training commands need of a model and its tokenizer, and where these may come from."""

import json
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from judge.messages import Message
from proxy.checkpoint import identify, load, resolve_model_dir
from tests.judge.conftest import make_tokenizer
from tests.training.models import PROMPTS, chat, data_rows, save_model
from training import dpo, evaluate, jsft, proxy_ppo, reward_model, sft
from training.base_model import CHAT_TEMPLATE
from training.console import TrainingError
from training.conversations import Conversations
from training.models import attention_of, context_of, end_ids, load_model
from training.policy import Decoding
from training.supervised import _ByLength, read_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for kind in ("sft", "preferences", "prompts"):
        rows = "".join(json.dumps(row) + "\n" for row in data_rows(kind))
        (directory / f"{kind}.jsonl").write_text(rows)
    return directory


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name in ("gemma2", "gpt2", "llama"):
        save_model(name, directory / name)
    return directory


def test_attention_that_caps_its_scores_is_computed_plainly(models_dir: Path) -> None:
    assert attention_of(str(models_dir / "gemma2")) == "eager"
    assert attention_of(str(models_dir / "llama")) is None


def test_the_context_of_absolute_positions(models_dir: Path) -> None:
    assert context_of(load_model(str(models_dir / "gpt2"))[0]) == 1024


def test_prompts_that_leave_no_room_for_a_response_are_left_out(
    models_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "model": str(models_dir / "gpt2"),
        "reward": "tests.training.models:length",
        "prompts": str(data / "prompts.jsonl"),
        "output": tmp_path,
        "steps": 1,
        "episodes": 4,
    }
    chats = Conversations(load_model(str(models_dir / "gpt2"))[1])
    lengths = sorted(len(chats.prompt_ids(chat(text))) for text in PROMPTS)
    decoding = Decoding(max_new_tokens=1024 - lengths[1], top_k=1)
    with pytest.raises(TrainingError, match="no prompt is within 3 tokens"):
        proxy_ppo.main(proxy_ppo.Options(**options, decoding=Decoding(max_new_tokens=1021)))
    with pytest.raises(TrainingError, match="leaves no room for a prompt"):
        proxy_ppo.main(proxy_ppo.Options(**options, decoding=Decoding(max_new_tokens=1024)))
    capsys.readouterr()
    proxy_ppo.main(proxy_ppo.Options(**options, decoding=decoding))
    assert f"left out 2 of 6 prompts of over {lengths[1]} tokens" in capsys.readouterr().out


def test_training_keeps_within_the_context(
    models_dir: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has no position after its last: one would be an index error."""
    model, long_text = str(models_dir / "gpt2"), "my dog " * 999
    rows, pairs = tmp_path / "sft.jsonl", tmp_path / "preferences.jsonl"
    rows.write_text(
        (data / "sft.jsonl").read_text() + json.dumps({"messages": chat("Hi", long_text)})
    )
    answers = {key: chat("Hi", f"{key} {long_text}")[1:] for key in ("chosen", "rejected")}
    pair = {"prompt": chat("Hi"), **answers}
    pairs.write_text((data / "preferences.jsonl").read_text() + json.dumps(pair))
    sft.main(sft.Options(model=model, sft=str(rows), output=tmp_path / "sft", max_length=9999))
    assert "left out 1 sequences over 1024 tokens" in capsys.readouterr().out
    for kind in ("implicit", "scalar"):
        reward_model.main(
            reward_model.Options(
                model=model,
                preferences=str(pairs),
                output=tmp_path / kind,
                kind=kind,
                max_length=9999,
                batch_size=4,
            )
        )
        assert re.search(r"left out 1 of \d+ pairs over 1024 tokens", capsys.readouterr().out)
    with pytest.raises(TrainingError, match="no pair is within 1 tokens"):
        dpo.main(
            dpo.Options(model=model, preferences=str(pairs), output=tmp_path / "dpo", max_length=1)
        )


def test_a_tokenizer_without_a_chat_template(models_dir: Path, data: Path, tmp_path: Path) -> None:
    shutil.copytree(models_dir / "llama", tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    common = {"model": str(tmp_path / "bare"), "output": tmp_path / "out"}
    pairs, rows = str(data / "preferences.jsonl"), str(data / "sft.jsonl")
    for main, options in (
        (sft.main, sft.Options(**common, sft=rows)),
        (jsft.main, jsft.Options(**common, sft=rows, preferences=(pairs,))),
        (reward_model.main, reward_model.Options(**common, preferences=pairs)),
    ):
        with pytest.raises(TrainingError, match="no chat template"):
            main(options)


def test_a_chat_template_that_refuses_a_conversation(models_dir: Path) -> None:
    chats = Conversations(load_model(str(models_dir / "gemma2"))[1])
    system = Message(role="system", content="Be brief.")
    with pytest.raises(TrainingError, match="refuses the conversation: System role not supported"):
        chats.prompt_ids([system, *chat(PROMPTS[0])])


def test_rows_that_the_chat_template_refuses_are_skipped(
    models_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": chat(text, "Yes.")} for text in PROMPTS * 4]
    rows[7]["messages"].insert(0, Message(role="system", content="Be brief."))
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = Conversations(load_model(str(models_dir / "gemma2"))[1])
    options = sft.Options(model="m", sft=str(path), output=tmp_path)
    assert len(read_answers(str(path), chats, options)) == 11
    printed = capsys.readouterr().out
    assert (
        "1 like line 8: the model's chat template refuses the conversation: System role" in printed
    )


CALL = {"type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
TOOL_CHAT: list[Message] = [
    {"role": "developer", "content": "Be brief."},
    *chat("What time is it?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "noon"},
]
WRITES_CALLS = CHAT_TEMPLATE.replace(
    "{% if not (continue",
    "{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}{% if not (continue",
)


def test_a_chat_template_gets_what_it_knows(models_dir: Path) -> None:
    tokenizer = load_model(str(models_dir / "llama"))[1]

    def rendered(template: str) -> str:
        tokenizer.chat_template = template
        return tokenizer.decode(Conversations(tokenizer).prompt_ids(TOOL_CHAT))

    call = '{"name": "now", "arguments": {"zone": "UTC"}}'
    start = "<|system|>Be brief.<|end|><|user|>What time is it?<|end|><|assistant|>"
    end = "<|end|><|tool|>noon<|end|><|assistant|>"
    assert rendered(CHAT_TEMPLATE) == start + call + end
    assert rendered(WRITES_CALLS) == f"{start}<call>{call}</call>{end}"
    with_developer_role = WRITES_CALLS + "{# developer #}"
    assert rendered(with_developer_role).startswith("<|developer|>Be brief.<|end|><|user|>")


def test_an_answer_that_calls_a_tool_is_learned_as_the_template_writes_it(models_dir: Path) -> None:
    tokenizer = load_model(str(models_dir / "llama"))[1]
    tokenizer.chat_template = WRITES_CALLS
    _, ids = Conversations(tokenizer).split_ids(TOOL_CHAT[:2], TOOL_CHAT[2])
    call = '{"name": "now", "arguments": {"zone": "UTC"}}'
    assert tokenizer.decode(ids) == f"<call>{call}</call><|end|>"


def test_an_answer_whose_spaces_join_the_templates_newline() -> None:
    """Code, as many data sets have it: the template ends in a newline, and the answer begins with an indentation."""
    tokenizer = make_tokenizer(["\n    return x"] * 5, 400)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    chats, asked = Conversations(tokenizer), chat("Write it.")
    prompt, response = chats.split_ids(asked, "    return x")
    assert prompt == chats.prompt_ids(asked)
    assert tokenizer.decode(response) == "    return x<|end|>"


def test_no_token_that_ends_a_response(models_dir: Path) -> None:
    model, tokenizer = load_model(str(models_dir / "llama"))
    model.generation_config.eos_token_id = [5, 9]
    assert end_ids(model, tokenizer) == {5, 9, tokenizer.eos_token_id}
    tokenizer.eos_token = None
    assert end_ids(model, tokenizer) == {5, 9}
    model.generation_config.eos_token_id = None
    with pytest.raises(TrainingError, match="no token ends a response"):
        end_ids(model, tokenizer)


def test_every_command_takes_a_hub_id(
    models_dir: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a cache laid out as the hub's client lays it out."""
    repository = tmp_path / "hub" / "models--someone--small"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(models_dir / "llama", snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    name = "someone/small"
    assert resolve_model_dir(name) == snapshot
    pairs, rows = str(data / "preferences.jsonl"), str(data / "sft.jsonl")
    sft.main(sft.Options(model=name, sft=rows, output=tmp_path / "sft"))
    jsft.main(jsft.Options(model=name, sft=rows, preferences=(pairs,), output=tmp_path / "jsft"))
    for kind in ("implicit", "scalar"):
        reward_model.main(
            reward_model.Options(model=name, preferences=pairs, output=tmp_path / kind, kind=kind)
        )
    proxy_ppo.main(
        proxy_ppo.Options(
            model=name,
            reward=str(tmp_path / "implicit"),
            prompts=str(data / "prompts.jsonl"),
            output=tmp_path / "proxy",
            steps=1,
            episodes=4,
        )
    )
    base = load(tmp_path / "proxy", base=identify(name)).base
    assert base.name == name
    with pytest.raises(TrainingError, match="is not a prompt of the toy data"):
        evaluate.main(
            evaluate.Options(model=name, proxy=tmp_path / "proxy", prompts=data / "prompts.jsonl")
        )


def test_batches_are_of_like_length_and_long_and_short_ones_mix() -> None:
    lengths = [10, 20, 30, 40] * 160
    sampler = _ByLength(lengths, batch_size=32, seed=0)
    sampler.set_epoch(0)
    order = list(sampler)
    assert sorted(order) == list(range(640))
    batches = [[lengths[i] for i in order[start : start + 32]] for start in range(0, 640, 32)]
    assert all(max(batch) - min(batch) <= 10 for batch in batches)
    firsts = [batch[0] for batch in batches[:5]]  # which transformers sorts, the longest first
    assert any(a < b for a, b in pairwise(firsts))
    second_sampler = _ByLength(lengths, batch_size=32, seed=0)
    second_sampler.set_epoch(0)
    assert list(second_sampler) == order
    second_sampler.set_epoch(1)
    assert list(second_sampler) != order
