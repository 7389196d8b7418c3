"""What commands that are clients of a running server share: the API key, and the server's error messages."""

import os

import httpx

API_KEY = "ASSENT_API_KEY"
"""Variable that holds the key, so that no list of processes shows it."""


def auth_headers(api_key: str | None) -> dict[str, str]:
    """The header with the given key, or else the one of the environment; {} without any."""
    key = api_key or os.environ.get(API_KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


def error_message(response: httpx.Response) -> str:
    """The server's reason for an error, in one line."""
    try:
        return str(response.json()["error"]["message"]).replace("\n", " ")
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
