"""vLLM's OpenAI-compatible server with Assent's routes. One line a module, in the order of a start:

- `__main__`    - `python -m server`: prepares the process before vLLM is imported.
- `cli`         - vLLM's flags and our own; everything that can be refused before the engine starts.
- `doctor`      - `python -m server doctor`: what a start would meet.
- `plugin`      - the endpoint plugin that hangs our routes and gates into vLLM's server.
- `engine`      - every name of vLLM's that the routes use.
- `state`       - what the routes share: the engine, the loaded proxies, readers of the worker.
- `proxies`     - which proxies are loaded, what a name stands for, and who still uses which.
- `access`      - who may use the server, and how much: keys, administrators, limits.
- `gate`        - the gates before vLLM's routes and before the engine, which every request passes.
- `admission`   - which proxy speaks in a request, or why it cannot.
- `schemas`     - what a request may say.
- `chat`        - POST /v1/chat/completions: every stage of a chat request.
- `completions` - POST /v1/completions.
- `best_of`     - N samples, a tournament, one winner.
- `answers`     - what we add to answers, whole or streamed.
- `receipts`    - what the worker counted and traced.
- `traces`      - a trace's entries, each with its token.
- `streams`     - server-sent events with our fields in them.
- `judging`     - POST /judge, and the judge as a client of the engine.
- `listing`     - GET /v1/models.
- `managing`    - GET, POST and DELETE /proxies.
- `remembered`  - what was loaded over HTTP, for a restart and for other servers.
- `request_log` - one line of JSON a request.
- `drain`       - SIGTERM: what is under way is finished first.
- `metrics`     - our counters beside vLLM's on GET /metrics.
"""
