"""Every method of vLLM's that this package replaces, and why. `proxy/` replaces classes in the worker's process.

- `install_plugin` replaces `vllm.plugins.load_endpoint_plugins`. vLLM loads plugins by entry points and VLLM_PLUGINS;
  ours must always be loaded, and no other.
- `replace_generate` replaces the engine's `generate`. All handlers that generate text call it: the one place to add the
  proxy to each of them.
- `replace_model_name` replaces `OpenAIServingModels.model_name`. A response names the model as the client did:
  `<model>:<proxy>`.
- `on_shutdown` replaces the engine's `shutdown`. vLLM ends with exit code 0 when its engine has died; a supervisor must
  see a failure.
- `replace_validation_handler` replaces `validation_exception_handler`, which vLLM registers after the plugin had its
  turn. Its message is Python's representation of every error.
- `ignore_port_owner` replaces `launcher.find_process_using_port`. vLLM asks at its end who else has the port, for a
  warning. A forked engine has it, and where the engine ends in that moment the question raises: exit code 1.

Nothing is patched for our routes, which replace vLLM's of the same path (`plugin`), and for SIGTERM, whose handler
`middleware.drain` sets after vLLM has set its own. `tests/server/test_vllm_patches.py` fails when vLLM changes what is
replaced.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import vllm.plugins
from fastapi.responses import Response
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.exception_handling import register

Generate = Callable[..., AsyncGenerator[Any, None]]


def install_plugin(plugin: Any) -> None:
    """Make vLLM load this endpoint plugin, and no other."""

    def load_endpoint_plugins(supported_tasks: Any = None) -> list[Any]:
        return [plugin]

    vllm.plugins.load_endpoint_plugins = load_endpoint_plugins


def replace_generate(engine: EngineClient, generate: Generate) -> Generate:
    """Have all handlers call `generate(prompt, sampling_params, request_id, **options)`; returns the engine's own."""
    original: Generate = engine.generate
    engine.generate = generate
    return original


def replace_model_name(models: OpenAIServingModels, model_name: Callable[..., str]) -> None:
    """Have all handlers call `model_name(lora_request=None)` for the model's name in a response."""
    models.model_name = model_name


def on_shutdown(engine: EngineClient, callback: Callable[[], None]) -> None:
    """Call `callback()` before the engine's first shutdown."""
    shutdown, is_called = engine.shutdown, False

    def replacement(*args: Any, **options: Any) -> Any:
        nonlocal is_called
        if not is_called:
            is_called = True
            callback()
        return shutdown(*args, **options)

    engine.shutdown = replacement


def replace_validation_handler(handler: Callable[..., Awaitable[Response]]) -> None:
    """Have `handler(request, error)` answer requests that do not fit; call it before the app is complete."""
    register.validation_exception_handler = handler


def ignore_port_owner() -> None:
    """Have vLLM end without asking which other process has its port."""
    launcher.find_process_using_port = lambda port: None
