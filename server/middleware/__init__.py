"""ASGI middleware that every request passes, in this order:

- `request_log` - one line of JSON on standard output for each request.
- `drain`       - SIGTERM: finish the requests under way, refuse new ones, stop.
- `access`      - API keys, administrators, rate limits, size of the body.
- `alignment`   - admission: resolves and pins the proxy of a request.

`announce` logs the end of the start, and `errors` has the error responses of all of them.
"""
