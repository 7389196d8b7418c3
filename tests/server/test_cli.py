"""Arguments that are refused before the engine starts: exit code 2, and one line that names the cause."""

import json
import os
import shutil
import socket
import warnings
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.learned_proxy import Spec
from tests.server.conftest import DEMO, free_port
from tests.warm import run

MODEL = str(DEMO / "model")
ALIGNED = DEMO / "proxies" / "aligned"


class CommandLine:
    """The command line without an engine: it records what an engine would be started with."""

    def __init__(self, serve):
        self.serve = serve
        self.started: list[Any] = []


@pytest.fixture
def cli(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))  # settings must not reach other tests
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing vllm warns
        import server.cli

    command_line = CommandLine(server.cli.serve)
    monkeypatch.setattr("server.cli.install_plugin", command_line.started.append)
    monkeypatch.setattr("server.cli.run_server", command_line.started.append)
    monkeypatch.setattr("server.cli.uvloop.run", lambda _: None)
    return command_line


def error_line(cli, capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        cli.serve(argv)
    assert exit_info.value.code == 2
    assert cli.started == []
    *_, last_line = capsys.readouterr().err.splitlines()
    assert last_line.startswith("python -m server: error: ")
    return last_line


def test_it_would_start(cli, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "from-the-environment")
    proxies = ["--proxy", f"a={ALIGNED}", "--proxy", f"b.2={ALIGNED}", "--shadow", f"c={ALIGNED}"]
    cli.serve(["--model", MODEL, *proxies, "--proxy-root", str(ALIGNED.parent), "--port", "9"])
    plugin, args = cli.started
    assert (args.host, args.port, args.model) == ("127.0.0.1", 9, MODEL)
    assert args.worker_cls == "proxy.worker.ProxyCPUWorker"
    assert [(proxy.name, proxy.directory, proxy.shadow) for proxy in plugin.proxies] == [
        ("a", ALIGNED, False),
        ("b.2", ALIGNED, False),
        ("c", ALIGNED, True),
    ]
    assert plugin.proxy_root == ALIGNED.parent
    assert plugin.base.name == "model"
    assert [caller.name for caller in plugin.access.callers.values()] == ["--api-key 1"]
    assert args.api_key is None
    assert "VLLM_API_KEY" not in os.environ


def test_home_in_every_path(cli, monkeypatch, tmp_path):
    """A shell does not expand `~` after `=`, and a file of settings does not either."""
    monkeypatch.setenv("HOME", str(DEMO))
    monkeypatch.chdir(tmp_path)
    database = tmp_path / "home" / "feedback.db"
    cli.serve(
        [
            *("--model=~/model", "--proxy", "a=~/proxies/aligned", "--shadow=b=~/proxies/polite"),
            *("--proxy-root=~/proxies", "--tokenizer=~/model"),
        ]
    )
    plugin, args = cli.started
    assert args.model == args.tokenizer == MODEL
    assert [proxy.directory for proxy in plugin.proxies] == [ALIGNED, DEMO / "proxies" / "polite"]
    assert plugin.proxy_root == DEMO / "proxies"
    cli.started.clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for feedback in ("~/feedback.db", "sqlite:///~/feedback.db"):
        cli.serve(["--model", MODEL, f"--feedback={feedback}"])
        assert database.exists()
        database.unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("flag", ["--judge", "--access", "--principles", "--chat-template"])
def test_home_in_other_paths(cli, monkeypatch, tmp_path, flag):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").write_text("{{ messages }}")
    import server.arguments

    args = server.arguments.parse(["--model", MODEL, f"{flag}=~/there"])
    value = getattr(args, flag.removeprefix("--").replace("-", "_"))
    assert str(value[0] if flag == "--judge" else value) == str(tmp_path / "there")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_model_that_is_cut_short(cli, tmp_path, capsys, name):
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    content = (model / name).read_bytes()
    (model / name).write_bytes(content[: len(content) // 2])
    assert f"{model / name} cannot be read" in error_line(cli, capsys, "--model", str(model))


def test_an_access_file_that_is_wrong(cli, tmp_path, capsys):
    (tmp_path / "access.toml").write_text("[keys.a]")
    assert "needs either sha256 or env" in error_line(
        cli, capsys, "--model", MODEL, "--access", str(tmp_path / "access.toml")
    )


def test_the_users_own_settings_win(cli, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    cli.serve([MODEL, "--host", "127.0.0.2", "--no-enforce-eager", "--api-key", "k1", "k2"])
    plugin, args = cli.started
    assert args.model == MODEL
    assert args.host == "127.0.0.2"
    assert not args.enforce_eager
    assert args.kv_cache_memory_bytes is None
    assert plugin.proxy_root is None  # nothing can be loaded over HTTP
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert len(plugin.access.callers) == 2


def test_a_small_model_on_a_cpu_gets_one_thread(cli, monkeypatch):
    for name in ("OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_KVCACHE_SPACE"):
        monkeypatch.delenv(name, raising=False)
    cli.serve(["--model", MODEL])
    _, args = cli.started
    assert os.environ["OMP_NUM_THREADS"] == "1"
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert args.block_size == 32
    assert args.kv_cache_memory_bytes == 2049 * 32 * 4096  # tests/server/test_kv_cache.py


def test_a_config_file(cli, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"model: {MODEL}\nproxy: a={ALIGNED}\nproxy-root: {ALIGNED.parent}\n")
    cli.serve(["--config", str(config), "--proxy", f"b={ALIGNED}", "--shadow", f"c={ALIGNED}"])
    plugin, _ = cli.started
    assert [proxy.name for proxy in plugin.proxies] == ["a", "b", "c"]
    assert plugin.proxy_root == ALIGNED.parent


@pytest.mark.parametrize(
    ("proxy", "message"),
    [
        ("aligned", "'aligned': expected NAME=DIR"),
        ("aligned=", "'aligned=': expected NAME=DIR"),
        ("=/tmp", "the name ''"),
        ("a/b=/tmp", "the name 'a/b'"),
        ("a:b=/tmp", "the name 'a:b'"),
        ("a b=/tmp", "the name 'a b'"),
        ("é=/tmp", "the name 'é'"),
        ("a=/no/such/directory", "a=/no/such/directory: there is no such directory"),
    ],
)
@pytest.mark.parametrize("flag", ["--proxy", "--shadow"])
def test_a_proxy_that_cannot_be(cli, capsys, flag, proxy, message):
    line = error_line(cli, capsys, "--model", MODEL, flag, proxy)
    assert message in line
    assert f"{flag} " in line


def test_two_proxies_behind_one_flag(cli, capsys):
    line = error_line(cli, capsys, "--model", MODEL, "--proxy", f"a={ALIGNED}", f"b={ALIGNED}")
    assert f"'b={ALIGNED}' belongs to no option" in line


def test_two_proxies_of_one_name(cli, capsys):
    line = error_line(
        cli, capsys, "--model", MODEL, "--proxy", f"a={ALIGNED}", "--proxy", f"a={ALIGNED}"
    )
    assert "'a' is given twice" in line
    line = error_line(
        cli, capsys, "--model", MODEL, "--proxy", f"a={ALIGNED}", "--shadow", f"a={ALIGNED}"
    )
    assert "'a' is given twice" in line


def test_a_proxy_whose_name_is_taken(cli, capsys):
    flags = ["--served-model-name", "llm", "llm:a", "--proxy", f"a={ALIGNED}"]
    assert "'llm:a'" in error_line(cli, capsys, "--model", MODEL, *flags)


def test_a_root_that_is_not_there(cli, capsys):
    line = error_line(cli, capsys, "--model", MODEL, "--proxy-root", "/no/such/directory")
    assert "--proxy-root /no/such/directory: there is no such directory" in line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("mine", "expected NAME=FROM"),
        ("mine=", "expected NAME=FROM"),
        ("mine=people", "expected NAME=FROM, with FROM of person, judge, person,judge or own"),
        ("mine=shadow", "expected NAME=FROM"),
        ("mine=own,judge", "own stands alone"),
        ("mine=own,shadow", "own stands alone"),
        ("a/b=own", "the name 'a/b'"),
        ("..=person", "the name '..'"),
        (".lock=person", "the name '.lock'"),
        ("aligned=own", "'aligned' is a proxy that is loaded already: each key has its own"),
        ("aligned=person,shadow", "one of both is a shadow"),
    ],
)
def test_what_cannot_be_learned(cli, capsys, tmp_path, value, message):
    flags = ["--proxy", f"aligned={ALIGNED}", "--feedback", tmp_path / "f.db"]
    flags = [*map(str, flags), "--proxy-root", str(tmp_path)]
    line = error_line(cli, capsys, "--model", MODEL, *flags, "--learn", value)
    assert message in line and f"--learn '{value}'" in line
    assert not (tmp_path / "f.db").exists()


def test_learning_needs_a_place_for_verdicts_and_proxies(cli, capsys, tmp_path):
    learn = ["--model", MODEL, "--learn", "mine=own"]
    assert "--learn needs --feedback and --proxy-root" in error_line(cli, capsys, *learn)
    flags = ["--feedback", str(tmp_path / "f.db")]
    assert "--learn needs --proxy-root" in error_line(cli, capsys, *learn, *flags)


def test_what_is_learned(cli, tmp_path):
    root = tmp_path / "not" / "there" / "yet"
    flags = ["--feedback", str(tmp_path / "f.db"), "--proxy-root", str(root)]
    learn = ["--learn", "mine=own", "--learn", "next=judge,person,shadow", "--learn=aligned=person"]
    cli.serve(["--model", MODEL, "--proxy", f"aligned={ALIGNED}", *flags, *learn])
    plugin, _ = cli.started
    assert list(plugin.learn) == [
        Spec("mine", ("person",), own=True),
        Spec("next", ("judge", "person"), shadow=True),
        Spec("aligned", ("person",)),
    ]
    assert root.is_dir()


@pytest.mark.parametrize("name", ["proxy.safetensors", "config.json"])
def test_a_missing_file(cli, capsys, tmp_path, name):
    broken = shutil.copytree(ALIGNED, tmp_path / "broken")
    (broken / name).unlink()
    line = error_line(cli, capsys, "--model", MODEL, "--proxy", f"a={broken}")
    assert str(broken / name) in line


def test_a_corrupt_checkpoint(cli, capsys, tmp_path):
    broken = shutil.copytree(ALIGNED, tmp_path / "broken")
    weights = broken / "proxy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    line = error_line(cli, capsys, "--model", MODEL, "--proxy", f"a={broken}")
    assert str(weights) in line
    assert "corrupt" in line


def test_a_proxy_of_another_llm(cli, capsys, tmp_path):
    other_model = shutil.copytree(DEMO / "model", tmp_path / "other")
    path = other_model / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    from proxy.checkpoint import fingerprint

    line = error_line(cli, capsys, "--model", str(other_model), "--proxy", f"a={ALIGNED}")
    assert fingerprint(other_model) in line
    assert fingerprint(MODEL) in line


def test_a_proxy_in_the_place_of_the_model(cli, capsys):
    line = error_line(cli, capsys, "--model", str(ALIGNED))
    assert "its config.json is not a language model's; it is a proxy: --proxy NAME=DIR" in line


def test_a_name_that_is_no_model(cli, capsys):
    """Neither a directory nor, without a network, a model of the hub."""
    line = error_line(cli, capsys, "--model", "nobody/no-such-model")
    assert "--model 'nobody/no-such-model': no such directory, and no such model on the hub" in line
    assert "no such directory" in error_line(cli, capsys, "no-such-model")


def test_a_model_of_a_kind_that_vllm_does_not_know(tmp_path):
    """vLLM's own error has seventy lines. It becomes one."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchModel"]}))
    result = run("server", "--model", str(model), "--port", str(free_port()))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "vLLM cannot serve" in result.stderr.splitlines()[-1]


def test_a_port_that_is_taken():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = run("server", "--model", MODEL, "--port", str(port))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"python -m server: error: cannot listen on 127.0.0.1:{port}: Address already in use; choose another --port"
    )


@pytest.mark.parametrize("model", ["/no/such/model", "./no-such-model", str(ALIGNED.parent)])
def test_an_unknown_model(cli, capsys, model):
    assert repr(model) in error_line(cli, capsys, "--model", model)


def test_no_model(cli, capsys):
    assert "--model DIR is missing" in error_line(cli, capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ("--headless",),
        ("--grpc",),
        ("--api-server-count", "2"),
        ("--pipeline-parallel-size", "2"),
        ("--prefill-context-parallel-size", "2"),
        ("--speculative-config", '{"method": "ngram", "rejection_sample_method": "synthetic"}'),
        ("--enable-batch-sharded-sampling",),
        ("--enable-trace-replay",),
    ],
)
def test_what_proxies_do_not_go_with_yet(cli, capsys, flags):
    assert flags[0] in error_line(cli, capsys, "--model", MODEL, *flags)


@pytest.mark.parametrize(
    ("flags", "hint"),
    [
        (["--prox", "a=b"], "--prox could match --proxy, --proxy-root"),
        (["--porxy", "a=b"], "--porxy; did you mean --proxy?"),
        (["--max-bodi-bytes", "3"], "did you mean --max-body-bytes?"),
        (["--max-modle-len=3"], "did you mean --max-model-len?"),
        (["--xyzzy"], "--xyzzy; see python -m server --help"),
    ],
)
def test_an_unknown_flag(cli, capsys, flags, hint):
    assert hint in error_line(cli, capsys, "--model", MODEL, *flags)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("docter", "there is no command 'docter': did you mean `python -m server doctor`?"),
        ("doctr", "did you mean `python -m server doctor`?"),
        ("serve", "did you mean `python -m server --model DIR`?"),
        ("sevre", "did you mean `python -m server --model DIR`?"),
    ],
)
def test_a_mistyped_command(cli, capsys, word, hint):
    assert hint in error_line(cli, capsys, word)
    assert hint in error_line(cli, capsys, word, "--model", MODEL)
    assert hint in error_line(cli, capsys, "--model", MODEL, word)


def test_a_word_too_many(cli, capsys):
    line = error_line(cli, capsys, "--model", MODEL, "one")
    assert "'one' belongs to no option" in line
    line = error_line(cli, capsys, "--model", MODEL, "one", "two")
    assert "'two' belongs to no option" in line


def test_a_value_that_cannot_be(cli, capsys):
    assert "--port" in error_line(cli, capsys, "--model", MODEL, "--port", "many")


def help_of(cli, capsys, *argv):
    with pytest.raises(SystemExit) as exit_info:
        cli.serve(argv)
    assert exit_info.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_our_options_come_first(cli, capsys, flag):
    text = help_of(cli, capsys, flag)
    titles = ["proxies:", "judge:", "feedback and learning:", "access and operation:"]
    titles.append("model and address (vLLM's options):")
    positions = [text.index(f"\n{title}\n") for title in titles]
    assert positions == sorted(positions)
    assert "--help=all" in text and "doctor" in text
    assert len(text.splitlines()) < 90


def test_every_option_of_ours_has_a_text():
    import argparse

    from server.arguments import VLLM_OPTIONS, _make_parser, add_own_options, help_text

    parser = argparse.ArgumentParser(add_help=False)
    add_own_options(parser)
    own_actions = [action for action in parser._actions if action.option_strings]
    assert len(own_actions) >= 12 and all(action.help for action in own_actions)
    assert all(action.option_strings[0] in help_text() for action in own_actions)
    known_flags = _make_parser()._option_string_actions
    for usage in VLLM_OPTIONS:  # vLLM has them, by these names
        assert all(
            word.rstrip(",") in known_flags for word in usage.split() if word.startswith("--")
        )


def test_all_options(cli, capsys):
    text = help_of(cli, capsys, "--help=all")
    assert "--proxy " in text and "--gpu-memory-utilization" in text
    assert len(text.splitlines()) > 500


def test_a_judge_that_cannot_be(cli, capsys, tmp_path):
    line = error_line(cli, capsys, "--model", MODEL, "--judge", str(tmp_path))
    assert f"{tmp_path} has no reward.json" in line


def test_a_database_that_cannot_be(cli, capsys, tmp_path):
    (tmp_path / "x").write_text("no database " * 99)
    line = error_line(cli, capsys, "--model", MODEL, "--feedback", str(tmp_path / "x"))
    assert "cannot open" in line and "not a database" in line


def test_the_command_itself():
    """In a process of its own, as a person starts it; the rest of this file calls the same function in this process."""
    result = run("server", "--model", MODEL, "--proxy", "a=/no/such/directory")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "python -m server: error: --proxy a=/no/such/directory: there is no such directory"
    )
