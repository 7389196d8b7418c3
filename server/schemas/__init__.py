"""The bodies of requests and responses. Unknown keys inside our own objects are errors.

- `alignment`  - the `alignment` object, and how answers are judged.
- `generation` - requests of the routes that generate text.
- `report`     - their responses: what the proxy and the judge did.
- `judge`      - /judge and /judge/rank.
- `proxies`    - /proxies.
- `feedback`   - /feedback.

Responses are described for the OpenAPI document alone: none passes through these classes, and tests compare both.
"""
