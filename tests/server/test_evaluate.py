"""How good is a judge? The figures, what is read, and a run on a real server."""

import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from judge import evaluate
from judge.evaluate import Judged, Options, figures, read_pairs
from judge.options import OptionError
from judge.sources import SourceError
from tests.server.conftest import API_KEY, Server

GOOD, BAD = "To look after your freezer, pull the plug first.", "Go away."
QUESTION = "How do I look after my freezer?"
REWARD_BENCH = {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD, "subset": "chat"}
REWARD_BENCH_2: dict[str, Any] = {
    "id": "7", "prompt": QUESTION, "chosen": [GOOD], "rejected": [BAD, "Not you again.", BAD + BAD],
    "num_correct": 1, "num_rejected": 3, "subset": "Focus", "additional_metadata": None,
}  # fmt: skip


def write(path: Path, *rows: Any) -> str:
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return str(path)


def make_judged(row: str, probability: float) -> Judged:
    return Judged(row, "all pairs", probability, consistent=True, is_tie=False)


def test_a_row_of_lists_is_right_where_all_its_pairs_are() -> None:
    result = figures(
        [
            make_judged("1", 0.9),
            make_judged("1", 0.8),
            make_judged("2", 0.9),
            make_judged("2", 0.4),
            make_judged("3", 0.5),
        ]
    )
    assert (result["pairs"], result["rows"]) == (5, 3)
    assert result["accuracy"] == pytest.approx(3.5 / 5)
    assert result["accuracy_by_row"] == pytest.approx(1.5 / 3)


def test_what_is_put_to_the_server(tmp_path: Path) -> None:
    tool_message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "now", "arguments": "{}"}],
    }
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    data = write(
        tmp_path / "rows.jsonl",
        REWARD_BENCH_2,
        {"prompt": chat, "chosen": [tool_message], "rejected": "No."},
        {"prompt": QUESTION, "chosen": GOOD, "rejected": GOOD},  # prefers nothing
    )
    pairs = read_pairs(Options(data=data, output=tmp_path))
    assert [pair.row.rpartition(" ")[2] for pair in pairs] == ["1", "1", "1", "2"]
    assert [pair.subset for pair in pairs] == ["Focus"] * 3 + ["all pairs"]
    assert [pair.pair["response_b"] for pair in pairs] == [*REWARD_BENCH_2["rejected"], "No."]
    assert pairs[0].pair["messages"] == [{"role": "user", "content": QUESTION}]
    assert pairs[3].pair == {
        "messages": chat,
        "response_a": '{"name": "now", "arguments": {}}',
        "response_b": "No.",
    }
    assert len(read_pairs(Options(data=data, output=tmp_path, num_pairs=2))) == 2
    broken = write(tmp_path / "broken.jsonl", REWARD_BENCH | {"subset": "\ud800"})
    with pytest.raises(SourceError, match="half of a surrogate pair"):
        read_pairs(Options(data=broken, output=tmp_path))


def test_a_run(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # of the table
    monkeypatch.setenv("ASSENT_API_KEY", API_KEY)
    endless = REWARD_BENCH | {"prompt": [{"role": "user", "content": "?"}] * 5000}
    rows = [*[REWARD_BENCH] * 8, endless, REWARD_BENCH_2, '{"prompt":']
    data = write(tmp_path / "rows.jsonl", *rows)
    options = Options(data=data, output=tmp_path / "out", base_url=server.url)
    evaluate.main(options)
    saved_figures = json.loads((tmp_path / "out/figures.json").read_text())
    assert {name: row["pairs"] for name, row in saved_figures.items()} == {
        "chat": 8,
        "Focus": 3,
        "all pairs": 11,
    }
    assert saved_figures["chat"]["accuracy"] in (0, 1)  # the same pair eight times
    assert saved_figures["Focus"]["rows"] == 1 and saved_figures["all pairs"]["rows"] == 9
    assert (tmp_path / "out/reliability.png").stat().st_size > 0
    printed = capsys.readouterr().out
    assert "skipped 1 of 13 rows" in printed and "by row" in printed
    assert "left out 1 of 12 pairs that the server refuses" in printed
    assert "line 9: `messages` has 5,000 items" in printed
    with pytest.raises(OptionError, match="figures.json is there already: .* --overwrite"):
        evaluate.main(options)
    by_proxy = replace(options, kind="proxy", proxy="aligned", overwrite=True)
    evaluate.main(by_proxy)
    saved_figures = json.loads((tmp_path / "out/figures.json").read_text())
    assert saved_figures["all pairs"]["consistency"] == 1  # a score knows no order


def test_names_of_subsets_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["[/red]", r"$\frac$"]
    evaluate.draw_reliability(
        {name: [make_judged("1", 0.9)] for name in names}, tmp_path / "chart.png"
    )
    evaluate.show({name: figures([make_judged("1", 0.9)]) for name in names})
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def test_ctrl_c_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(coroutine: Any) -> None:
        coroutine.close()
        raise KeyboardInterrupt

    data = write(tmp_path / "rows.jsonl", REWARD_BENCH)
    monkeypatch.setattr("asyncio.run", interrupt)
    arguments = ["--data", data, "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["judge.evaluate", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(evaluate.__file__, run_name="__main__")
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted: nothing was written\n"


def test_what_fails_is_said_in_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path / "good.jsonl", REWARD_BENCH)
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    cases: dict[str, tuple[str | Path, ...]] = {
        "there are no rows": ("--data", write(tmp_path / "empty.jsonl")),
        "line 1: not JSON": ("--data", write(tmp_path / "text.jsonl", "hello")),
        "a broken Parquet file": ("--data", tmp_path / "cut.parquet"),
        "no such file": ("--data", tmp_path / "none.jsonl"),
        "is a directory": ("--data", tmp_path),
        "the server refuses: This server needs an API key": ("--data", good),
        "the server refuses: unknown principle 'x'": (
            "--data", good, "--api-key", API_KEY, "--principles", "x",
        ),
        "the server refuses: ": ("--data", good, "--base-url", f"{server.url}/nowhere/"),
        "--num-pairs 0: Input should be greater than 0": ("--data", good, "--num-pairs", "0"),
        "is a file, and must be a directory": ("--data", good, "--output", good),
    }  # fmt: skip
    for expected, extra in cases.items():
        arguments = ["--output", tmp_path / "out", "--base-url", server.url, *extra]
        monkeypatch.setattr("sys.argv", ["judge.evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(evaluate.__file__, run_name="__main__")
        message = str(exit_info.value)
        assert message.startswith("error: ") and expected in message and "\n" not in message


def test_a_data_set_of_another_kind(tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", *[{"text": "hello"}] * 3)
    with pytest.raises(SourceError, match="line 1: the field 'chosen' is missing .* 3 of 3 rows"):
        read_pairs(Options(data=data, output=tmp_path))
