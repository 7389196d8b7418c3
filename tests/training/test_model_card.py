"""The model cards that the commands write, read as the Hub reads them."""

import json
import shlex
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tyro
from huggingface_hub import ModelCard

from deploy.demo import cards
from proxy.checkpoint import identify, load
from tests.training.conftest import run_command
from training import proxy_dpo
from training.console import TrainingError
from training.model_card import CARD_FILE, Card, DataFile, Score, add_scores
from training.run_marker import MARKER, settings_of


def read_card(directory: Path) -> ModelCard:
    return ModelCard.load(directory / CARD_FILE)


def data_of(directory: Path) -> Any:
    return read_card(directory).data


def command_in(card: ModelCard) -> list[str]:
    """The first one: the run's own."""
    commands = (line for line in card.text.splitlines() if line.startswith("python -m training."))
    return shlex.split(next(commands))[2:]


@pytest.fixture(scope="module")
def runs(
    work_dir: Path,
    sft: Path,
    implicit_reward: Path,
    scalar_reward: Path,
    rlhf: Path,
    self_judged: Path,
    direct_proxy: Path,
) -> dict[str, Path]:
    """Kind -> the directory that a command wrote."""
    return {
        "proxy": direct_proxy,
        "proxy-rlhf": work_dir / "proxy-aligned",
        "reward": scalar_reward,
        "model": sft,
        "lora": self_judged,
    }


def test_every_command_writes_a_card_that_the_hub_reads(runs: dict[str, Path]) -> None:
    for tag, directory in runs.items():
        data = data_of(directory)
        assert data.library_name == "assent"
        assert data.license == "unknown"
        assert {"assent", tag} <= set(data.tags)
        assert data.get("base_model") is None  # it is a directory, which the Hub would refuse
        assert "README.md" in json.loads((directory / MARKER).read_text())["files"]


def test_the_command_in_a_card_has_the_options_of_the_run(runs: dict[str, Path]) -> None:
    for directory in runs.values():
        marker = json.loads((directory / MARKER).read_text())
        name, *arguments = command_in(read_card(directory))
        assert name == marker["command"]
        options = tyro.cli(import_module(name).Options, args=arguments)
        assert settings_of(options, marker["inputs"]) == marker["options"]


def test_a_proxys_card_has_data_scores_and_decoding(direct_proxy: Path, work_dir: Path) -> None:
    text = read_card(direct_proxy).text
    data = work_dir / "world/preferences.jsonl"
    lines = len(data.read_text().splitlines())
    assert f"| `--preferences` | `{data}` | {lines} |" in text
    assert f"`{identify(str(work_dir / 'base')).fingerprint}`" in text
    assert "| preferences ordered correctly by Σ log π/p | 0." in text and "±" in text
    assert "| K, candidates at a position at most | 16 |" in text
    assert "![Curves](curves.png)" in text and (direct_proxy / "curves.png").is_file()
    assert "--proxy direct=DIR" in text


def test_a_card_changes_no_version(direct_proxy: Path, tmp_path: Path) -> None:
    copy = tmp_path / "proxy"
    shutil.copytree(direct_proxy, copy)
    version = load(copy, base=None).version
    (copy / CARD_FILE).write_text("# mine")
    assert load(copy, base=None).version == version


def test_a_run_replaces_its_own_card_and_no_other(work_dir: Path, tmp_path: Path) -> None:
    output = tmp_path / "proxy"
    arguments = [
        "training.proxy_dpo", "--model", work_dir / "base", "--max-rows", "20", "--epochs", "1",
        "--preferences", work_dir / "world/preferences.jsonl", "--output", output,
    ]  # fmt: skip
    run_command(*arguments)
    (output / CARD_FILE).write_text("# edited")
    run_command(*arguments, "--overwrite")
    assert data_of(output).library_name == "assent"

    other = tmp_path / "notes"
    other.mkdir()
    (other / CARD_FILE).write_text("# somebody else's")
    options = proxy_dpo.Options(
        model=str(work_dir / "base"),
        preferences=str(work_dir / "world/preferences.jsonl"),
        output=other,
        overwrite=True,
    )
    with pytest.raises(TrainingError, match=r"did not write \(README.md\)"):
        proxy_dpo.main(options)
    assert (other / CARD_FILE).read_text() == "# somebody else's"


def test_ids_on_the_hub_are_metadata(direct_proxy: Path) -> None:
    card = Card(
        name="mine",
        kind="proxy",
        base=load(direct_proxy, base=None).base,
        base_model="org/llm",
        license="mit",
        datasets=["org/pairs"],
        data=[DataFile("preferences", "org/pairs:train")],
    )
    data: Any = ModelCard(card.text()).data
    assert (data.base_model, data.license, data.datasets) == ("org/llm", "mit", ["org/pairs"])
    assert "--model org/llm --proxy mine=DIR" in card.text()


def test_the_demos_cards_are_up_to_date() -> None:
    for name in cards.ABOUT:
        assert cards.toy_card(name).text() == (cards.TOY / name / CARD_FILE).read_text()
    assert cards.plain_card().text() == (cards.PLAIN / CARD_FILE).read_text()


def test_evaluate_adds_what_it_measured(direct_proxy: Path, work_dir: Path, tmp_path: Path) -> None:
    proxy = tmp_path / "mine"
    shutil.copytree(direct_proxy, proxy)
    arguments = [
        "training.evaluate", "--model", work_dir / "base", "--proxy", proxy, "--num-prompts", "5", "--card",
        "--prompts", work_dir / "world/prompts_validation.jsonl", "--decoding.max-new-tokens", "8",
    ]  # fmt: skip
    run_command(*arguments)
    first = (proxy / CARD_FILE).read_text()
    added = set(first.splitlines()) - set((direct_proxy / CARD_FILE).read_text().splitlines())
    assert len(added) == 3 and all("| 5 prompts of `" in line for line in added)
    assert any(
        "win against the frozen LLM's, by the reference scorer | 0." in line for line in added
    )
    run_command(*arguments)  # replaces its own
    assert (proxy / CARD_FILE).read_text() == first
    assert ModelCard(first).content == first


def test_scores_are_added_to_a_card_without_any(direct_proxy: Path) -> None:
    base = load(direct_proxy, base=None).base
    bare = Card(name="mine", kind="probe", base=base).text()
    scores = [Score("share", 0.25, 0.125, 4, "pairs"), Score("KL", 1.5)]
    text = add_scores(bare, scores)
    assert (
        "## Scores\n\n| figure | value | measured on |\n|---|---|---|\n| share | 0.25 ± 0.125 | 4 pairs |"
        in text
    )
    assert text == Card(name="mine", kind="probe", base=base, scores=scores).text()
    assert add_scores(text, [Score("KL", 2.0)]).count("| KL | 2 |") == 1
    assert "1.5" not in add_scores(text, [Score("KL", 2.0)])
