"""The registry of loaded proxies, with workers that fail in ways the real one does not on demand."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import HTTPException

from proxy.checkpoint import load
from server.access import CALLER
from server.proxies import Proxies, ProxyStateError, check_name, find_below


class Ranks:
    """Two ranks that record their calls; `change_second` changes the second one's answer to a load."""

    def __init__(self):
        self.loaded = set()
        self.calls = []
        self.change_second = lambda answer: answer
        self.unloads_fail = False

    async def collective_rpc(self, method, *, args):
        self.calls.append((method, *args))
        await asyncio.sleep(0)
        if method == "load_proxy":
            name, directory, _ = args
            version = load(directory, base=None).version
            self.loaded.add((name, version))
            answer = {"name": name, "version": version, "directory": directory}
            return [answer, self.change_second(dict(answer))]
        assert method == "unload_proxy"
        if self.unloads_fail:
            raise RuntimeError("the engine is busy dying")
        if args not in self.loaded:
            raise RuntimeError(f"No proxy {args} is loaded.")
        self.loaded.remove(args)
        return [{}, {}]


def in_flight(proxies):
    return [(proxy.state, proxy.in_flight) for proxy in proxies]


async def wait_for_sweeps(proxies):
    while proxies._sweeps:
        await asyncio.sleep(0.001)


def test_ranks_that_disagree_load_nothing(proxy_root):
    async def run(change_second):
        ranks = Ranks()
        ranks.change_second = change_second
        proxies = Proxies(ranks)
        with pytest.raises(ProxyStateError) as error:
            await proxies.load("a", proxy_root / "v1")
        assert (list(proxies), proxies.names(), ranks.loaded) == ([], [], set())
        return error.value

    mismatch = asyncio.run(run(lambda answer: answer | {"version": "0" * 12}))
    assert mismatch.status == 409
    assert "changed while it was loaded" in str(mismatch)
    assert "0" * 12 in str(mismatch)
    missing_version = asyncio.run(run(lambda answer: {}))
    assert missing_version.status == 409


def test_a_failed_load_leaves_the_one_before(proxy_root):
    async def run():
        ranks = Ranks()
        proxies = Proxies(ranks)
        first, _ = await proxies.load("a", proxy_root / "v1")
        proxies.pin(first)
        ranks.change_second = lambda answer: {"error": "out of memory"}
        with pytest.raises(ProxyStateError):
            await proxies.load("a", proxy_root / "v2")
        assert proxies.bound("a") is first
        assert in_flight(proxies) == [("serving", 1)]
        assert ranks.loaded == {("a", first.version)}

    asyncio.run(run())


def test_only_the_last_request_takes_a_version_with_it(proxy_root):
    async def run():
        ranks = Ranks()
        proxies = Proxies(ranks)
        old, _ = await proxies.load("a", proxy_root / "v1")
        proxies.pin(old)
        proxies.pin(old)
        new, _ = await proxies.load("a", proxy_root / "v2")
        assert in_flight(proxies) == [("draining", 2), ("serving", 0)]
        proxies.unpin(old)
        await wait_for_sweeps(proxies)
        assert ranks.loaded == {("a", old.version), ("a", new.version)}
        proxies.unpin(old)
        await wait_for_sweeps(proxies)
        assert ranks.loaded == {("a", new.version)}
        assert old.state == "unloaded"
        assert list(proxies) == [new]

    asyncio.run(run())


def test_a_version_that_comes_back_just_then_stays(proxy_root):
    """Its last request ends, and before it is swept out its name is bound to it again."""

    async def run():
        ranks = Ranks()
        proxies = Proxies(ranks)
        old, _ = await proxies.load("a", proxy_root / "v1")
        proxies.pin(old)
        await proxies.load("a", proxy_root / "v2")
        proxies.unpin(old)  # the sweep waits for its turn
        await proxies.load("a", proxy_root / "v1")
        await wait_for_sweeps(proxies)
        (reloaded,) = proxies
        assert proxies.bound("a") is reloaded
        assert reloaded.version == old.version
        assert {version for _, version in ranks.loaded} == {old.version}

    asyncio.run(run())


def test_an_unload_that_fails_is_tried_again(proxy_root):
    async def run():
        ranks = Ranks()
        proxies = Proxies(ranks)
        await proxies.load("a", proxy_root / "v1")
        ranks.unloads_fail = True
        proxy = await proxies.unload("a")
        assert (proxy.state, proxies.bound("a")) == ("draining", None)
        ranks.unloads_fail = False
        await proxies.load("b", proxy_root / "v2")
        assert proxy.state == "unloaded"
        assert {name for name, _ in ranks.loaded} == {"b"}

    asyncio.run(run())


def test_names_of_served_models_are_taken():
    check_name("a", {"llm", "llm:b", "adapter"})
    with pytest.raises(ProxyStateError, match="llm:a") as error:
        check_name("a", {"llm", "llm:a"})
    assert error.value.status == 409


def test_the_root_itself_may_be_a_link(proxy_root, tmp_path):
    link = tmp_path / "root"
    link.symlink_to(proxy_root)
    assert find_below(link, "v1") == proxy_root / "v1"
    with pytest.raises(ProxyStateError, match="symbolic link"):
        find_below(link, "link-out")


def test_without_a_root_nothing_is_loaded(proxy_root):
    """The routes' own functions: every other server of these tests has a root."""
    from server.routes.proxies import load_proxy
    from server.schemas.proxies import LoadRequest

    ranks = Ranks()
    assent = SimpleNamespace(proxies=Proxies(ranks, root=None))
    raw_request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(assent=assent)))
    request = LoadRequest(name="a", path=str(proxy_root / "v1"))
    with pytest.raises(HTTPException) as error:
        asyncio.run(load_proxy(request, raw_request))
    assert error.value.status_code == 403
    assert "--proxy-root" in error.value.detail
    assert ranks.calls == []


def test_adapters_are_listed_with_every_proxy(proxy_root):
    from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList

    from server.routes.models import list_models

    class Models:
        async def show_available_models(self):
            return ModelList(data=[ModelCard(id="llm"), ModelCard(id="adapter", parent="llm")])

    async def run():
        proxies = Proxies(Ranks())
        await proxies.load("a", proxy_root / "v1")
        await proxies.load("b", proxy_root / "v2")
        await proxies.load("dark", proxy_root / "v3", shadow=True)
        assent = SimpleNamespace(proxies=proxies, models=Models(), learning=None)
        state = SimpleNamespace(assent=assent)
        scope = {CALLER: SimpleNamespace(admin=True)}
        return await list_models(SimpleNamespace(app=SimpleNamespace(state=state), scope=scope))

    parents = {card["id"]: card["parent"] for card in asyncio.run(run())["data"]}
    assert parents == {
        "llm": None,
        "adapter": "llm",
        "llm:a": "llm",
        "llm:b": "llm",
        "adapter:a": "adapter",
        "adapter:b": "adapter",
    }
