"""Which learned version serves: after one was forgotten, for many keys, and of several servers. Without an engine."""

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from judge.feedback import Feedback, Preference
from proxy.checkpoint import BaseModelId
from proxy.learned import save_version, versions
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.position_store import PositionStore
from server import learned_proxies, learning
from server.access import Caller, Limits
from server.feedback_writer import FeedbackWriter
from server.learned_proxy import LearnedProxy, Spec, State
from server.learning import Learning
from server.proxies import Proxies
from server.proxy_manifest import Entry, ProxyManifest
from tests.server.test_proxies import Ranks

BASE = BaseModelId(name="llm", fingerprint="0" * 64)
CONFIG = ProxyConfig(hidden_size=4, vocab_size=8, width=2)
SHARED_SPEC, OWN_SPEC = Spec("ours", ("person",)), Spec("mine", ("person",), own=True)


class Servers:
    """Servers of one root and one database, whose workers record their calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.directory = root, root / ".learn"
        self.feedback = Feedback(str(root / "feedback.db"))

    def make(self, *specs: Spec) -> Learning:
        proxies = Proxies(Ranks())
        config = SimpleNamespace(max_model_len=64, get_diff_sampling_param=dict)
        engine: Any = SimpleNamespace(model_config=config)
        manifest = ProxyManifest(self.root, proxies)
        feedback_writer = FeedbackWriter(self.feedback)
        return Learning(specs, feedback_writer, proxies, manifest, engine, engine, model={})

    def version(self, proxy: LearnedProxy, *callers: str) -> Path:
        """A version of these callers' rows, newer than all before it."""
        rows = dict(enumerate(callers))
        age = len(versions(proxy.directory))
        version = save_version(proxy.directory, ProxyNetwork(CONFIG), rows, base=BASE, training={})
        os.utime(proxy.directory / version, (age, age))
        return proxy.directory / version

    def choose(self, caller: str) -> None:
        prompt = [{"role": "user", "content": "x"}]
        self.feedback.add([Preference("person", prompt, "y", "z", caller=caller)])


@pytest.fixture
def servers(tmp_path: Path) -> Servers:
    return Servers(tmp_path)


def make_caller(name: str) -> Caller:
    return Caller(name, Limits(), identity=name)


async def serve(server: Learning, proxy: LearnedProxy, version: Path) -> None:
    await server.learned.serve(proxy, version)
    proxy.write(State(seen=9, live=version.name if proxy.owner else None))


def test_a_shared_name_falls_back_to_the_newest_version_without_the_forgotten(
    servers: Servers,
) -> None:
    async def run() -> None:
        server = servers.make(SHARED_SPEC)
        shared_proxy = LearnedProxy("ours", servers.directory)
        old = servers.version(shared_proxy, "bob")
        older = servers.version(shared_proxy, "bob", "carol")
        live = servers.version(shared_proxy, "bob", "alice")
        await serve(server, shared_proxy, live)
        for name in ("alice", "bob"):
            servers.choose(name)
        store = PositionStore(servers.directory)
        for name in ("alice", "bob"):
            store.put(f"of {name}", name, b"read")
        store.close()
        forgotten = await server.forget("alice")
        assert forgotten == {"preferences": 1, "answers": 0, "versions": 1}
        assert {*versions(shared_proxy.directory)} == {old, older}
        proxy = server.learned.find("ours", make_caller("bob"))
        assert proxy is not None and proxy.version == older.name
        path = f".learn/ours/{older.name}"
        entry = server.learned._manifest.entries["ours"]
        assert entry == Entry(path=path, version=older.name)
        assert shared_proxy.read().seen == 0  # it is learned anew
        assert [row.caller for row in servers.feedback.rows()] == ["bob"]
        store = PositionStore(servers.directory)
        assert (store.get("of alice"), store.get("of bob")) == (None, b"read")
        # A caller who is in none of the versions changes none.
        assert (await server.forget("dave"))["versions"] == 0
        assert (await server.forget("bob"))["versions"] == 2
        assert server.learned.find("ours", make_caller("bob")) is None

    asyncio.run(run())


def test_a_version_that_somebody_else_has_loaded_stays(servers: Servers) -> None:
    async def run() -> None:
        server = servers.make(SHARED_SPEC)
        shared_proxy, other_proxy = (
            LearnedProxy(name, servers.directory) for name in ("ours", "other")
        )
        servers.version(shared_proxy, "alice")
        shared_proxy.write(State())
        await server.learned._proxies.load("ours", servers.version(other_proxy, "bob"))
        assert (await server.forget("alice"))["versions"] == 1
        proxy = server.learned.find("ours", make_caller("bob"))
        assert proxy is not None and proxy.version == versions(other_proxy.directory)[0].name

    asyncio.run(run())


def test_hundreds_of_keys_have_a_proxy_each_and_some_are_loaded(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_proxies, "MAX_LOADED", 3)

    async def run() -> None:
        server = servers.make(OWN_SPEC)
        callers = [make_caller(f"key {i}") for i in range(6)]
        live = {}
        for caller in callers:
            own_proxy = server.learned.of(OWN_SPEC, caller.identity)
            await serve(server, own_proxy, version := servers.version(own_proxy, caller.identity))
            live[caller.name] = version.name
        for caller in callers:
            assert server.learned.find("mine", caller) is None  # it was not asked for yet
            await server.learned.wake("mine", caller)
            proxy = server.learned.find("mine", caller)
            assert proxy is not None and proxy.version == live[caller.name]
        await server.learned.wake("mine", callers[3])
        await server.learned.wake("mine", callers[0])
        names = [
            caller.name for caller in callers if server.learned.find("mine", caller) is not None
        ]
        assert names == ["key 0", "key 3", "key 5"]
        assert server.learned._proxies.names() == []
        # A version that another server has learned is found.
        own_proxy = server.learned.of(OWN_SPEC, "key 0")
        newer = servers.version(own_proxy, "key 0")
        own_proxy.write(State(live=newer.name))
        await server.learned.wake("mine", callers[0])
        proxy = server.learned.find("mine", callers[0])
        assert proxy is not None and proxy.version == newer.name
        own_proxy.write(State(live=None))
        await server.learned.wake("mine", callers[0])
        assert server.learned.find("mine", callers[0]) is None

    asyncio.run(run())


def test_of_several_servers_one_learns(servers: Servers) -> None:
    first, second = servers.make(SHARED_SPEC), servers.make(SHARED_SPEC)
    assert first._is_first() and first._is_first()
    assert not second._is_first()
    assert first._lock is not None
    first._lock.close()  # its server has gone
    assert second._is_first() and second._lock is not None
    second._lock.close()


def test_a_damaged_state_is_begun_anew(servers: Servers) -> None:
    proxy = LearnedProxy("ours", servers.directory)
    assert proxy.read() == State()
    proxy.write(State(seen=7))
    assert proxy.read() == State(seen=7)
    (proxy.directory / "learned.json").write_text("{")
    assert proxy.read() == State()


@pytest.mark.parametrize(
    ("count", "seen", "due"),
    [
        (9, 0, False),
        (10, 0, True),
        (14, 10, False),
        (15, 10, True),
        (149, 100, False),
        (150, 100, True),
    ],
)
def test_when_a_pass_is_due(count: int, seen: int, due: bool) -> None:
    assert learning._is_due(count, seen) == due
