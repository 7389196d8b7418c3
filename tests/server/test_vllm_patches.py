"""What server/vllm_patches.py replaces is still what vLLM calls, and in the way that the replacements expect.

For upgrades of vLLM: each test names the replacement and its reason.
"""

import ast
import asyncio
import inspect
import os
import re
import signal
from pathlib import Path

import pytest
from fastapi import FastAPI

from tests.server.conftest import REPOSITORY

HANDLERS = {
    "openai/chat_completion/serving.py",
    "openai/chat_completion/batch_serving.py",
    "openai/completion/serving.py",
    "openai/responses/serving.py",
    "scale_out/token_in_token_out/serving.py",
}
"""vLLM's handlers that call the engine: an Anthropic, Cohere or /invocations request goes through one of them."""


@pytest.fixture(scope="module")
def entrypoints() -> Path:
    import vllm.entrypoints

    return Path(vllm.entrypoints.__path__[0])


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_only_the_named_file_replaces_methods_of_vllms() -> None:
    """No other file of the server assigns to an attribute of the engine, of vLLM's handlers or of a module of it."""
    assignments = []
    for path in sorted((REPOSITORY / "server").rglob("*.py")):
        if path.name == "vllm_patches.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            assignments += [
                f"{path}: {ast.unparse(target)}"
                for target in targets
                if isinstance(target, ast.Attribute)
                and re.match(
                    r"(engine\w*|models|vllm[.\w]*|state\.openai\w*)\.", ast.unparse(target)
                )
            ]
    assert assignments == []


def test_plugins_are_loaded_by_the_name_that_is_replaced(entrypoints: Path) -> None:
    """`install_plugin`: the name is looked up in the module when the app is built, and one argument is passed."""
    from vllm.plugins import load_endpoint_plugins
    from vllm.plugins.endpoint_plugins import interface

    assert parameters(load_endpoint_plugins)[:1] == ["supported_tasks"]
    source = inspect.getsource(interface)
    # Inside of a function: a module that had imported the name earlier would keep vLLM's own.
    assert re.search(r"^ +from vllm\.plugins import load_endpoint_plugins$", source, re.MULTILINE)
    assert "load_endpoint_plugins(supported_tasks)" in source


def test_all_handlers_draw_through_generate(entrypoints: Path) -> None:
    """`replace_generate`: nothing else hands a request to the engine, and the three first arguments are as expected."""
    from vllm.v1.engine.async_llm import AsyncLLM

    names = ["self", "prompt", "sampling_params", "request_id"]
    assert parameters(AsyncLLM.generate)[:4] == names
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY
        for parameter in list(inspect.signature(AsyncLLM.generate).parameters.values())[4:]
    )
    assert inspect.isasyncgenfunction(AsyncLLM.generate)
    callers = {
        path.relative_to(entrypoints).as_posix()
        for path in entrypoints.rglob("*.py")
        if "engine_client.generate(" in path.read_text(encoding="utf-8")
    }
    assert callers >= HANDLERS
    # Others: beam search, which admission refuses, audio, which has no proxy, and the judge's own reads.
    assert callers - HANDLERS == {
        "generate/beam_search/online.py",
        "generate/label_reads.py",
        "speech_to_text/base/serving.py",
        "speech_to_text/realtime/connection.py",
    }


def test_responses_take_the_models_name_from_the_method(entrypoints: Path) -> None:
    """`replace_model_name`: called with the adapter at most."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert parameters(OpenAIServingModels.model_name) == ["self", "lora_request"]
    for handler in ("openai/chat_completion/serving.py", "openai/completion/serving.py"):
        assert "models.model_name(" in (entrypoints / handler).read_text(encoding="utf-8")


def test_the_server_shuts_its_engine_down_by_the_method(entrypoints: Path) -> None:
    """`on_shutdown`: called once in the end, and `errored` then says whether the engine has died."""
    from vllm.v1.engine.async_llm import AsyncLLM

    assert parameters(AsyncLLM.shutdown) == ["self", "timeout"]
    assert isinstance(AsyncLLM.errored, property)
    entry = (entrypoints / "launchers/api_server/entry.py").read_text(encoding="utf-8")
    assert "async_llm.shutdown(timeout=" in entry


def test_the_callback_comes_once_and_before_the_shutdown() -> None:
    from server.vllm_patches import on_shutdown

    class Engine:
        def shutdown(self, timeout=None):
            calls.append(timeout)

    engine, calls = Engine(), []
    on_shutdown(engine, lambda: calls.append("callback"))
    engine.shutdown(timeout=3)
    engine.shutdown()
    assert calls == ["callback", 3, None]


def test_sigterm_is_ours_once_the_server_runs() -> None:
    """`middleware.drain`: vLLM and uvicorn set no handler after the app's start."""
    from vllm.entrypoints.launchers import launcher

    source = inspect.getsource(launcher.serve_http)
    # Set before the server's task runs: nothing is awaited between. The app's own start comes after it.
    begin, end = source.index("server.serve("), source.index("add_signal_handler(signal.SIGTERM")
    assert "await " not in source[begin:end]
    assert "NoSignalServer(config" in source[:begin]


def test_the_validation_handler_is_looked_up_when_it_is_registered() -> None:
    """`replace_validation_handler`: by its name in the module, after the plugins."""
    from vllm.entrypoints.launchers import app
    from vllm.entrypoints.serve.exception_handling import register

    source = inspect.getsource(register.init_exception_handler)
    assert "app.exception_handler(RequestValidationError)(validation_exception_handler)" in source
    build = inspect.getsource(app.build_app)
    assert build.index("plugin") < build.index("init_exception_handler(app)")


def test_a_server_ends_though_the_owner_of_its_port_has_just_ended(monkeypatch) -> None:
    """`ignore_port_owner`: without it, vLLM's question about a forked engine that is dead by now raises."""
    import psutil
    from vllm.entrypoints.launchers import launcher

    from server.vllm_patches import ignore_port_owner

    def dead_owner(port):
        raise psutil.ZombieProcess(1)

    async def serve_and_stop() -> None:
        app = FastAPI()
        app.state.engine_client = None
        serving = asyncio.create_task(launcher.serve_http(app, None, host="127.0.0.1", port=0))
        while not (hasattr(app.state, "server") and app.state.server.started):
            assert not serving.done(), "it ended before it served"
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            await (await serving)
        finally:
            await app.state.server.shutdown()

    monkeypatch.setattr(launcher, "find_process_using_port", dead_owner)
    with pytest.raises(psutil.ZombieProcess):  # so the name is the one that vLLM looks up
        asyncio.run(serve_and_stop())
    ignore_port_owner()
    asyncio.run(serve_and_stop())
