"""vLLM's OpenAI-compatible server with Assent's routes.

The start:

- `__main__`         - `python -m server`: prepares the process before vLLM is imported.
- `own_packages`     - whether `server`, `proxy`, `judge` and `training` are ours.
- `arguments`        - the command line: our options, and vLLM's.
- `checks`           - everything that can be refused before the engine starts.
- `cli`              - every stage of the start.
- `tool_calls`       - which of vLLM's parsers reads the model's tool calls.
- `kv_cache`         - how much memory a server takes on a CPU, and the size of its cache.
- `doctor`           - `python -m server doctor`: the same checks without a start.
- `plugin`           - adds our routes and middleware to vLLM's server.
- `vllm_patches`     - every method of vLLM's that is replaced, and why.
- `ending`           - the end of the process, whatever hangs.
- `engine`           - every name of vLLM's that the routes use.
- `app_state`        - what the routes share.

A request (`middleware/`, then `routes/`):

- `http_protocol`    - uvicorn's HTTP protocol with limits of time and size.
- `body_shape`       - limits on the shape of a JSON body.
- `alignment_field`  - `alignment` in a header, and misspelt.
- `access`           - API keys, administrators and limits.
- `proxy_choice`     - which proxies a request names, and which versions these are.
- `admission`        - which proxies align a request, or why it is refused.
- `engine_wrapper`   - adds the admitted proxy to every request to the engine.
- `schemas/`         - the bodies of requests and responses.
- `validation_errors` - what does not fit in a request, in one line.
- `openapi`          - the OpenAPI document, and the page /docs.
- `openapi_examples` - its examples.
- `best_of`          - N samples, a tournament, the best as the answer.
- `best_of_stream`   - the same as a stream with progress.
- `samples`          - its samples: drawn when they are wanted, stopped when they have lost.
- `growth`           - what has been generated of one so far.
- `answers`          - adds alignment statistics to responses.
- `streams`          - the same in server-sent events.
- `alignment_stats`  - what the worker counted of a request.
- `traces`           - what the worker traced, token by token.
- `readiness`        - whether the engine answers.
- `tracing`          - a span for each request, the parent of vLLM's.
- `metrics`          - counters on GET /metrics.

The page at `/` is in `page/`: no Python, and `routes.page` serves it.

Proxies, judges and feedback:

- `proxies`          - the loaded versions, what a name stands for, and which requests use them.
- `proxy_manifest`   - proxies loaded over HTTP, in a file for restarts and other servers.
- `judges`           - the judges of a request.
- `judge_adapters`   - those that are LoRAs or probes on this engine.
- `remote_judges`    - those on other servers: their files,
- `remote_client`    - and what is asked over HTTP.
- `calibration`      - how far the judge can be trusted, as metrics.
- `feedback_writer`  - writes preferences to the database.
- `learning`         - learns proxies from them while serving.
- `learned_proxies`  - which learned proxies there are, and which versions serve.
- `learned_proxy`    - the files of one learned proxy.
- `learner`          - the process that learns.
"""
