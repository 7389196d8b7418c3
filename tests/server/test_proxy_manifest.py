"""The file of what was loaded over HTTP, where it is damaged, outdated or cannot be written."""

import asyncio
import fcntl
import json
import shutil
from types import SimpleNamespace

import pytest

from proxy.checkpoint import load
from server.proxies import Proxies
from server.proxy_manifest import Entry, ProxyManifest
from tests.server.test_proxies import Ranks


@pytest.fixture
def root(proxy_root, tmp_path):
    for name in ("v1", "v2"):
        shutil.copytree(proxy_root / name, tmp_path / name)
    return tmp_path


def entry(root, name, **more):
    return Entry(path=name, version=load(root / name, base=None).version, **more)


def manifest(root):
    return ProxyManifest(root, Proxies(Ranks()))


def names(found):
    return {proxy.name: proxy.version for proxy in found.proxies}


def test_it_is_written_whole_and_read_again(root):
    async def run():
        one, other = manifest(root), manifest(root)
        first, second = entry(root, "v1"), entry(root, "v2", shadow=True)
        await one.proxies.load("a", root / "v1")
        await other.proxies.load("b", root / "v2", shadow=True)
        assert one.change("a", first) and other.change("b", second)
        assert json.loads((root / "proxies.json").read_text()) == {
            "proxies": {
                "a": {"path": "v1", "version": first.version, "shadow": False},
                "b": {"path": "v2", "version": second.version, "shadow": True},
            }
        }
        # Each learns of the other's, though it has written the file itself.
        for each in (one, other):
            await each.reconcile()
            assert names(each) == {"a": first.version, "b": second.version}
        await one.proxies.unload("b")
        assert one.change("b", None)
        await other.reconcile()
        assert names(other) == {"a": first.version}
        left = {path.name for path in root.iterdir()}
        assert left == {"v1", "v2", "proxies.json", ".proxies.lock"}

    asyncio.run(run())


def test_a_load_is_not_undone_by_what_the_file_said_before_it(root):
    """Another server has written the name's older version, and this one looks while it loads the newer."""
    from server.routes.proxies import load_proxy
    from server.schemas import LoadRequest

    async def run():
        found, older, newer = manifest(root), entry(root, "v1"), entry(root, "v2")
        found.proxies.root = root
        assent = SimpleNamespace(
            proxies=found.proxies,
            manifest=found,
            models=SimpleNamespace(base_model_paths=[], lora_requests={}),
        )
        request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(assent=assent)))
        load = asyncio.create_task(load_proxy(LoadRequest(name="a", path="v2"), request))
        await asyncio.sleep(0)
        assert manifest(root).change("a", older)
        await asyncio.gather(load, found.reconcile())
        for _ in range(3):
            await found.reconcile()
        assert json.loads((root / "proxies.json").read_text())["proxies"]["a"]["path"] == "v2"
        assert found.proxies.bound("a").version == newer.version

    asyncio.run(run())


def test_what_fails_is_tried_again_and_hinders_nobody(root, caplog):
    async def run():
        found, first = manifest(root), entry(root, "v1")
        found.change("b", entry(root, "v2"))
        found.change("a", first)
        found = manifest(root)  # the same server, started again
        (root / "v1").rename(root / "moved")
        for _ in range(3):
            await found.reconcile()
        assert list(names(found)) == ["b"]
        said = [r.message for r in caplog.records if "a of" in r.message]
        assert len(said) == 1 and "does not exist below --proxy-root" in said[0]
        (root / "moved").rename(root / "v1")
        await found.reconcile()
        assert names(found)["a"] == first.version

    asyncio.run(run())


def test_a_checkpoint_that_is_another_by_now_is_not_loaded(root, caplog):
    async def run():
        found = manifest(root)
        found.change("a", entry(root, "v1").model_copy(update={"version": "0" * 12}))
        found = manifest(root)
        await found.reconcile()
        assert names(found) == {}
        assert "by now, and not 000000000000" in caplog.text

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", "{", '{"proxies": {"a": {}}}', '{"proxies": {"a": {"path": 3, "version": "x"}}}']
)
def test_a_damaged_file(root, text, caplog):
    """It is named once and left as it is; what is loaded goes on."""

    async def run():
        found = manifest(root)
        found.change("a", entry(root, "v1"))
        await found.proxies.load("a", root / "v1")
        (root / "proxies.json").write_text(text)
        for _ in range(3):
            await found.reconcile()
        assert len([r for r in caplog.records if "cannot be read" in r.message]) == 1
        assert list(names(found)) == ["a"]
        assert not found.change("b", entry(root, "v2"))
        assert (root / "proxies.json").read_text() == text

    asyncio.run(run())


def test_paths_in_the_file_do_not_lead_out(root, caplog):
    async def run():
        found = manifest(root / "v1")
        outside = {"path": "../v2", "version": "x", "shadow": False}
        (root / "v1" / "proxies.json").write_text(json.dumps({"proxies": {"a": outside}}))
        await found.reconcile()
        assert names(found) == {} and "must not contain '..'" in caplog.text

    asyncio.run(run())


def test_where_it_cannot_be_written(root, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    found, first = manifest(root), entry(root, "v1")
    assert found.change("a", first)
    monkeypatch.setattr("server.proxy_manifest.os.fsync", full)
    assert not found.change("b", entry(root, "v2"))
    assert not found.change("a", None)
    assert list(json.loads((root / "proxies.json").read_text())["proxies"]) == ["a"]
    assert not list(root.glob(".proxies.*[!k]"))  # nothing half-written is left


def test_a_lock_that_somebody_keeps_is_not_waited_for(root, monkeypatch, caplog):
    monkeypatch.setattr("server.proxy_manifest.LOCK_SECONDS", 0.2)
    one = manifest(root)
    with (root / ".proxies.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert not one.change("a", entry(root, "v1"))
    assert "was locked by another process" in caplog.text
    assert one.change("a", entry(root, "v1"))
