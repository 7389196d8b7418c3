"""ASGI middleware that every request passes, in this order:

- `request_log`      - one line of JSON on standard output for each request.
- `anthropic_errors` - errors of /v1/messages in Anthropic's shape.
- `drain`            - SIGTERM: finish the requests under way, refuse new ones, stop.
- `access`           - API keys, administrators, rate limits, size of the body.
- `alignment`        - admission: resolves and pins the proxy of a request.

`announce` logs the end of the start, and `errors` has the error responses of all of them.
"""

from starlette.types import Scope


def route_path(scope: Scope) -> str:
    """The path below `--root-path`, as Starlette finds routes by it.

    `str.removeprefix` does not do: with the root path `/p` it makes `roxies` of `/proxies`.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path
