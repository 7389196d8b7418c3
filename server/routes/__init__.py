"""The HTTP routes, one file each. vLLM's own routes stay as they are; one of ours replaces vLLM's of the same path.

- `chat`        - POST /v1/chat/completions: vLLM's, with a proxy, best of N and recorded choices.
- `completions` - POST /v1/completions: vLLM's, with a proxy.
- `responses`   - POST /v1/responses: vLLM's, with a proxy.
- `messages`    - POST /v1/messages: vLLM's, with a proxy.
- `models`      - GET /v1/models.
- `judge`       - POST /judge and /judge/rank.
- `feedback`    - GET, POST and DELETE /feedback.
- `proxies`     - GET, POST and DELETE /proxies, and GET and POST /proxies/NAME/learn.
- `cards`       - GET /proxies/NAME/card.
- `page`        - GET /: the page in `server/page/`.
- `positions`   - POST /positions: hidden states of given responses, for a training elsewhere.
"""
