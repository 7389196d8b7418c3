"""The bounds of a connection, against uvicorn with a small app, over real sockets."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvicorn

from server import http_protocol

CHUNK = b"x" * 65536


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A server with short times and small bounds."""
    for name, value in {
        "MAX_CONNECTIONS": 20,
        "HEAD_SECONDS": 0.5,
        "BODY_SECONDS": 0.5,
        "WRITE_SECONDS": 0.5,
    }.items():
        monkeypatch.setattr(http_protocol, name, value)
    config = uvicorn.Config(
        echo, http=http_protocol.BoundedHttpProtocol, lifespan="off", log_level="critical"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


DISCONNECTED = threading.Event()


async def echo(scope, receive, send):
    """Answers with the length of the body; `/endless` sends without an end."""
    length, has_more = 0, True
    while has_more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, has_more = length + len(message["body"]), message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    if scope["path"] == "/endless":
        disconnect = asyncio.ensure_future(receive())
        while not disconnect.done():
            await send({"type": "http.response.body", "body": CHUNK, "more_body": True})
            await asyncio.sleep(0)
        DISCONNECTED.set()
        return
    await send({"type": "http.response.body", "body": str(length).encode()})


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes."""
    connection.settimeout(10)
    data = b""
    try:
        while chunk := connection.recv(65536):
            data += chunk
    except ConnectionResetError:
        pass
    return data


def test_honest_requests_on_one_connection(address):
    with httpx.Client(base_url="http://{}:{}".format(*address)) as client:
        for length in (0, 10, 300_000):
            assert client.post("/", content=b"y" * length).text == str(length)
        assert client.get("/", headers={"x-long": "z" * 30_000}).text == "0"


def test_pipelined_requests(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n" * 3)
        time.sleep(0.3)
        connection.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert read_all(connection).count(b"200 OK") == 4


@pytest.mark.parametrize(
    "flood", [b"a: b\r\n" * 20_000, b"a: " + b"b" * 100_000, b"", b"c" * 100_000], ids=len
)
def test_a_head_that_does_not_end(address, flood):
    line = b"GET /" + flood if flood.startswith(b"c") else b"GET / HTTP/1.1\r\n" + flood
    with socket.create_connection(address) as connection:
        start = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(line)
        answer = read_all(connection)
        assert time.monotonic() - start < 5
    # The kernel may throw the answer away where the client goes on sending.
    assert answer == b"" or answer.startswith((b"HTTP/1.1 431", b"HTTP/1.1 408", b"HTTP/1.1 400"))


def test_the_answer_to_a_long_head_says_what_may_be_sent(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\na: " + b"b" * 65_530)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"may have 65536 bytes" in answer


@pytest.mark.parametrize(
    "beginning",
    [b"", b"GET", b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf"],
)
def test_a_request_that_does_not_end(address, beginning):
    with socket.create_connection(address) as connection:
        connection.sendall(beginning)
        start = time.monotonic()
        answer = read_all(connection)
        assert time.monotonic() - start < 5
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_request_that_comes_a_byte_at_a_time(address):
    with socket.create_connection(address) as connection:
        start = time.monotonic()
        with suppress(BrokenPipeError, ConnectionResetError):
            for byte in b"GET / HTTP/1.1\r\nhost: " + b"a" * 100:
                connection.sendall(bytes([byte]))
                time.sleep(0.05)
        assert time.monotonic() - start < 4


def test_more_connections_than_there_may_be(address):
    connections = [socket.create_connection(address) for _ in range(20)]
    time.sleep(0.2)
    with socket.create_connection(address) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 503 ")
    for connection in connections:
        connection.close()
    time.sleep(0.2)
    assert httpx.get("http://{}:{}/".format(*address)).text == "0"


def test_a_client_that_does_not_read(address):
    DISCONNECTED.clear()
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        assert DISCONNECTED.wait(10)


def test_a_client_that_reads_slowly(address):
    DISCONNECTED.clear()
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n")
        count = 0
        end = time.monotonic() + 2  # four times WRITE_SECONDS
        while time.monotonic() < end:
            count += len(connection.recv(2**20))
            time.sleep(0.01)
        assert not DISCONNECTED.is_set() and count > len(CHUNK)
    assert DISCONNECTED.wait(10)
