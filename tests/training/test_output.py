"""Outputs that are refused before anything is written or that are replaced, and what an interrupted run leaves."""

import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks.models import DEMO
from training import (
    base_model,
    dpo,
    evaluate,
    export,
    jsft,
    output,
    prepare,
    proxy_dpo,
    proxy_ppo,
    reward_model,
    rlhf_ppo,
    self_judge,
    sft,
)
from training.console import Interrupted, TrainingError
from training.run_marker import MARKER, write_whole
from training.saving import saving
from training.toy_data import files as toy_files

MODEL = DEMO / "model"


@dataclass(frozen=True)
class Options:
    """Options of a command that copies its data."""

    data: Path
    output: Path
    number: int = 1
    resume: bool = False
    overwrite: bool = False


def copy(options: Options, **extra: Any) -> bool:
    """Returns whether the command had something to do."""
    with output.run(options, "copy", reads=("data",), writes=("a.txt", "parts/*.txt")) as run:
        if run.is_finished:
            return False
        run.start()
        (options.output / "parts").mkdir(exist_ok=True)
        (options.output / "parts" / "b.txt").write_text(str(options.number))
        if extra.get("fail"):
            run.saved = "part b"
            raise extra["fail"]
        (options.output / "a.txt").write_text(options.data.read_text())
    return True


@pytest.fixture
def options(tmp_path: Path) -> Options:
    data = tmp_path / "data.txt"
    data.write_text("one")
    return Options(data, tmp_path / "out")


def contents(directory: Path) -> dict[str, bytes]:
    """All files below a directory but the marker."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def test_a_finished_run_is_neither_replaced_nor_done_again_unasked(options: Options) -> None:
    assert copy(options)
    files = contents(options.output)
    assert files == {"a.txt": b"one", "parts/b.txt": b"1"}
    with pytest.raises(
        TrainingError, match=r"a finished run of copy: name another directory, or .* --overwrite"
    ):
        copy(options)
    times = {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}
    assert not copy(replace(options, resume=True))
    assert times == {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}


def test_overwriting_removes_what_the_earlier_run_wrote_and_nothing_else(options: Options) -> None:
    copy(options)
    other_files = {"notes.txt": "mine", "parts/notes.md": "mine too"}
    for name, text in other_files.items():
        (options.output / name).write_text(text)
    with pytest.raises(ZeroDivisionError):
        copy(replace(options, overwrite=True, number=2), fail=ZeroDivisionError())
    files = {name: text.decode() for name, text in contents(options.output).items()}
    assert files == other_files | {"parts/b.txt": "2"}


def test_what_came_after_a_finished_run_is_not_its_own(options: Options) -> None:
    copy(options)
    (options.output / "parts/c.txt").write_text("mine, though the run might have written it")
    with pytest.raises(TrainingError, match=r"did not write \(parts/c.txt\): move them"):
        copy(replace(options, overwrite=True))
    assert set(contents(options.output)) == {"a.txt", "parts/b.txt", "parts/c.txt"}


def test_a_mistake_in_the_inputs_destroys_no_earlier_run(options: Options) -> None:
    copy(options)
    with (
        pytest.raises(ZeroDivisionError),
        output.run(replace(options, overwrite=True), "copy", reads=("data",), writes=("a.txt",)),
    ):
        raise ZeroDivisionError  # before anything is written
    assert contents(options.output) == {"a.txt": b"one", "parts/b.txt": b"1"}


@pytest.mark.parametrize("name", ["a.txt", "parts/c.txt", MARKER])
def test_files_of_others_are_never_replaced(options: Options, name: str) -> None:
    path = options.output / name
    path.parent.mkdir(parents=True)
    path.write_text("theirs")
    for overwrite in (False, True):
        for resume in (False, True):
            with pytest.raises(TrainingError):
                copy(replace(options, overwrite=overwrite, resume=resume))
    assert path.read_text() == "theirs"
    assert len(list(options.output.rglob("*.*"))) == 1


def test_it_writes_beside_files_of_others_only_where_told_to(options: Options) -> None:
    options.output.mkdir()
    (options.output / "notes.md").write_text("mine")
    with pytest.raises(TrainingError, match=r"is not empty \(notes.md\) and holds no run of copy"):
        copy(options)
    assert copy(replace(options, overwrite=True))
    assert (options.output / "notes.md").read_text() == "mine"


def test_the_directory_of_another_command(options: Options) -> None:
    copy(options)
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with (
            pytest.raises(TrainingError, match="holds what copy made, and this is move"),
            output.run(replace(options, **flags), "move", reads=(), writes=()),
        ):
            raise AssertionError
    assert contents(options.output)


def test_an_unfinished_run_goes_on_with_the_same_options_and_data_alone(options: Options) -> None:
    with pytest.raises(ZeroDivisionError):
        copy(options, fail=ZeroDivisionError())
    with pytest.raises(
        TrainingError, match=r"an unfinished run of copy: continue with --resume, or"
    ):
        copy(options)
    options.data.write_text("two")
    with pytest.raises(
        TrainingError, match=r"with other options \(number\) and other data or models \(data\)"
    ):
        copy(replace(options, resume=True, number=2))
    options.data.write_text("one")
    moved = options.data.rename(options.data.with_name("moved.txt"))  # its content counts
    assert copy(replace(options, data=moved, resume=True))
    assert contents(options.output)["a.txt"] == b"one"
    options.data.write_text("three")
    with pytest.raises(TrainingError, match=r"other data or models \(data\)"):
        copy(replace(options, resume=True))  # though it is finished


def test_resume_and_overwrite_contradict_each_other(options: Options) -> None:
    with pytest.raises(TrainingError, match="give one"):
        copy(replace(options, resume=True, overwrite=True))


def test_a_model_that_has_changed(options: Options, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    with_model = replace(options, data=model)
    with pytest.raises(IsADirectoryError):  # in the copy, after the start
        copy(with_model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(TrainingError, match=r"other data or models \(data\)"):
        copy(replace(with_model, resume=True))


def test_interrupted(options: Options) -> None:
    with pytest.raises(Interrupted) as interrupted:
        copy(options, fail=KeyboardInterrupt())
    assert str(interrupted.value) == (
        f"interrupted: saved up to part b in {options.output}; the same command continues with --resume"
    )
    with (
        pytest.raises(Interrupted, match="^interrupted: nothing was written$"),
        output.run(replace(options, output=options.output / "x"), "copy", reads=(), writes=()),
    ):
        raise KeyboardInterrupt


def test_only_the_first_of_several_processes_looks_after_the_directory(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    with output.run(options, "copy", reads=(), writes=()) as first:
        first.start()
        monkeypatch.setenv("RANK", "1")
        with output.run(options, "copy", reads=(), writes=()) as second:
            second.start()
        monkeypatch.delenv("RANK")
        assert '"finished": false' in (options.output / MARKER).read_text().replace(":f", ": f")
    assert '"finished": true' in (options.output / MARKER).read_text().replace(":t", ": t")


def test_a_model_s_file_of_a_rare_name(options: Options) -> None:
    """The name is known only when the model is saved: files of others are kept then, too."""
    options.output.mkdir()
    (options.output / "vocab.txt").write_text("mine")
    (options.output / "model-notes.safetensors").write_text("mine")

    def save(*names: str) -> None:
        with saving(options.output) as directory:
            for name in names:
                (directory / name).write_text("the run's")

    def open_output() -> Any:
        return output.run(
            replace(options, overwrite=True),
            "copy",
            reads=(),
            writes=(".saving", "model.safetensors"),
        )

    with pytest.raises(TrainingError, match=r"did not write \(vocab.txt\)"), open_output() as run:
        run.start()
        save("model.safetensors", "vocab.txt")
    assert set(contents(options.output)) == {"vocab.txt", "model-notes.safetensors"}
    with open_output() as run:
        run.start()
        save("model.safetensors", "merges.txt")
        save("model.safetensors", "merges.txt")  # its own, again
    assert contents(options.output)["model-notes.safetensors"] == b"mine"
    with open_output():  # the earlier run's files are removed when the next begins to write
        pass
    with open_output() as run:
        run.start()
    assert set(contents(options.output)) == {"vocab.txt", "model-notes.safetensors"}


# Every command, with the options that are its inputs.
COMMANDS: dict[ModuleType, dict[str, Any]] = {
    sft: {"model": str, "sft": str},
    jsft: {"model": str, "sft": str, "preferences": tuple, "principles": Path},
    dpo: {"model": str, "preferences": str, "held_out": str},
    reward_model: {"model": str, "preferences": str, "held_out": str},
    proxy_dpo: {"model": str, "preferences": str, "held_out": str},
    proxy_ppo: {"model": str, "reward": str, "prompts": str},
    rlhf_ppo: {"model": str, "reward": str, "prompts": str},
    self_judge: {"model": str, "prompts": str, "held_out": str, "judge": str, "outside": str},
    base_model: {"corpus": tuple},
    prepare: {"model": str, "preferences": str},
    export: {"feedback": str},
    evaluate: {"model": str, "proxy": Path, "prompts": str, "reward": tuple},
}
CASES = [(command, name) for command, inputs in COMMANDS.items() for name in inputs]


@pytest.mark.parametrize(("command", "name"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_no_command_writes_to_its_input(command: ModuleType, name: str, tmp_path: Path) -> None:
    inputs = {}
    for option, kind in COMMANDS[command].items():
        path = tmp_path / option
        path.mkdir()
        (path / "config.json").write_text("precious")
        inputs[option] = (str(path),) if kind is tuple else kind(path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / name)
    files = contents(tmp_path)
    for target in (tmp_path / name, link, link / "below", tmp_path):
        for overwrite in (False, True):
            options = command.Options(**inputs, output=target, overwrite=overwrite)
            with pytest.raises(TrainingError, match=r"(is|is in|holds) an input, --"):
                command.main(options)
    assert contents(tmp_path) == files


def test_a_database_given_as_a_url(tmp_path: Path) -> None:
    database = tmp_path / "feedback.db"
    database.write_text("precious")
    options = export.Options(feedback=f"sqlite:///{database}", output=database, overwrite=True)
    with pytest.raises(TrainingError, match="is an input, --feedback"):
        export.main(options)


@pytest.mark.parametrize("command", [*COMMANDS, toy_files], ids=lambda x: x.__name__)
def test_paths_that_cannot_be(command: ModuleType, tmp_path: Path) -> None:
    inputs = {
        name: ("nowhere",) if kind is tuple else kind("nowhere")
        for name, kind in COMMANDS.get(command, {}).items()
    }
    file, directory = tmp_path / "file", tmp_path / "directory"
    file.write_text("precious")
    directory.mkdir()
    wrong_kind = directory if command in (export, evaluate) else file
    for target, message in (
        (wrong_kind, "must be a"),
        (file / "below", "is a file, and must be a dir"),
    ):
        with pytest.raises(TrainingError, match=message):
            command.main(command.Options(**inputs, output=target))
    assert file.read_text() == "precious" and not list(directory.iterdir())


def test_a_file_is_replaced_where_told_to(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text("earlier")
    inputs = {"model": "m", "proxy": Path("p"), "prompts": "q"}
    with pytest.raises(TrainingError, match="is there already: .* replace it with --overwrite"):
        evaluate.main(evaluate.Options(**inputs, output=figures))
    (tmp_path / "key.json").write_text("earlier")
    with pytest.raises(TrainingError, match="key.json is there already"):
        evaluate.main(evaluate.Options(**inputs, blind=tmp_path))
    (tmp_path / "key.json").unlink()
    output.check_file(figures, evaluate.Options(**inputs, overwrite=True), reads=())
    write_whole(figures, "later")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["later"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    sizes = {"num_sft": 40, "num_preferences": 10, "num_prompts": 5, "num_held_out": 5}
    toy_files.main(toy_files.Options(output=directory / "world", **sizes))
    return directory / "world" / "sft.jsonl"


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """Limits every file to a megabyte, like a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk(rows: Path, tmp_path: Path, file_size_limit: None) -> None:
    options = sft.Options(
        model=str(MODEL), sft=str(rows), output=tmp_path / "out", batch_size=20, save_every=1
    )
    message = (
        r"out cannot be written; is the disk full\? \(.*\); nothing was saved yet in .*--resume"
    )
    with pytest.raises(TrainingError, match=message):
        sft.main(options)
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_other_ways_to_say_that_a_disk_is_full(options: Options, error: Exception) -> None:
    with pytest.raises(TrainingError, match="is the disk full.* saved up to part b"):
        copy(options, fail=error)


def test_ctrl_c_in_a_trainer_says_how_to_go_on(rows: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [
        *(sys.executable, "-m", "training.sft", "--model", MODEL, "--sft", rows, "--epochs", "999"),
        *("--batch-size", "40", "--save-every", "1", "--output", target),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )

    def num_saved() -> int:
        files = target.glob("checkpoints/checkpoint-*/trainer_state.json")
        return max((int(file.parent.name.split("-")[1]) for file in files), default=0)

    while num_saved() < 2:  # the first is then not only written, but known
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted: saved up to step" in errors and "continues with --resume" in errors


def test_ctrl_c_while_a_command_is_imported() -> None:
    code = "import sys; sys.argv[0] = '-m'; import training; raise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == "interrupted: nothing was written"
    assert result.returncode in (130, -signal.SIGINT)  # a shell reports 130 for both
