"""vLLM's OpenAI-compatible server with Assent's routes. One line a module, in the order of a start:

- `__main__`    - `python -m server`: prepares the process before vLLM is imported.
- `cli`         - vLLM's flags and --proxy; everything that can be refused before the engine starts.
- `plugin`      - the endpoint plugin that hangs our routes into vLLM's server.
- `engine`      - every name of vLLM's that the routes use.
- `state`       - what the routes share: the engine, the loaded proxies, the judge.
- `auth`        - one API key for every route but /health.
- `schemas`     - what a request may say.
- `chat`        - POST /v1/chat/completions: every stage of a chat request.
- `admission`   - which proxy speaks in a chat request, or why it cannot.
- `best_of`     - N samples, a tournament, one winner.
- `receipts`    - what the proxy did in a request, and how the answer says so.
- `judging`     - POST /judge, and the judge as a client of the engine.
- `listing`     - GET /v1/models and GET /proxies.
- `metrics`     - our counters beside vLLM's on GET /metrics.
"""
