"""The manifest of proxies that were loaded over HTTP, where it is damaged, outdated or cannot be written."""

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


def entry(root, name, **fields):
    return Entry(path=name, version=load(root / name, base=None).version, **fields)


def make_manifest(root):
    return ProxyManifest(root, Proxies(Ranks()))


def loaded_versions(manifest):
    return {proxy.name: proxy.version for proxy in manifest.proxies}


def test_it_is_written_whole_and_read_again(root):
    async def run():
        first, second = make_manifest(root), make_manifest(root)
        first_entry, second_entry = entry(root, "v1"), entry(root, "v2", shadow=True)
        await first.proxies.load("a", root / "v1")
        await second.proxies.load("b", root / "v2", shadow=True)
        assert first.change("a", first_entry) and second.change("b", second_entry)
        assert json.loads((root / "proxies.json").read_text()) == {
            "proxies": {
                "a": {"path": "v1", "version": first_entry.version, "shadow": False},
                "b": {"path": "v2", "version": second_entry.version, "shadow": True},
            }
        }
        # Each learns of the other's, though it has written the file itself.
        for manifest in (first, second):
            await manifest.reconcile()
            assert loaded_versions(manifest) == {
                "a": first_entry.version,
                "b": second_entry.version,
            }
        await first.proxies.unload("b")
        assert first.change("b", None)
        await second.reconcile()
        assert loaded_versions(second) == {"a": first_entry.version}
        names = {path.name for path in root.iterdir()}
        assert names == {"v1", "v2", "proxies.json", ".proxies.lock"}

    asyncio.run(run())


def test_a_load_is_not_undone_by_what_the_file_said_before_it(root):
    """Another server has written the name's older version, and this one reads it while it loads the newer."""
    from server.routes.proxies import load_proxy
    from server.schemas.proxies import LoadRequest

    async def run():
        manifest, older, newer = make_manifest(root), entry(root, "v1"), entry(root, "v2")
        manifest.proxies.root = root
        assent = SimpleNamespace(
            proxies=manifest.proxies,
            manifest=manifest,
            models=SimpleNamespace(base_model_paths=[], lora_requests={}),
        )
        request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(assent=assent)))
        load_task = asyncio.create_task(load_proxy(LoadRequest(name="a", path="v2"), request))
        await asyncio.sleep(0)
        assert make_manifest(root).change("a", older)
        await asyncio.gather(load_task, manifest.reconcile())
        for _ in range(3):
            await manifest.reconcile()
        assert json.loads((root / "proxies.json").read_text())["proxies"]["a"]["path"] == "v2"
        assert manifest.proxies.bound("a").version == newer.version

    asyncio.run(run())


def test_what_fails_is_tried_again_and_hinders_nobody(root, caplog):
    async def run():
        manifest, first_entry = make_manifest(root), entry(root, "v1")
        manifest.change("b", entry(root, "v2"))
        manifest.change("a", first_entry)
        manifest = make_manifest(root)  # the same server, started again
        (root / "v1").rename(root / "moved")
        for _ in range(3):
            await manifest.reconcile()
        assert list(loaded_versions(manifest)) == ["b"]
        messages = [record.message for record in caplog.records if "a of" in record.message]
        assert len(messages) == 1 and "does not exist below --proxy-root" in messages[0]
        (root / "moved").rename(root / "v1")
        await manifest.reconcile()
        assert loaded_versions(manifest)["a"] == first_entry.version

    asyncio.run(run())


def test_a_checkpoint_that_is_another_by_now_is_not_loaded(root, caplog):
    async def run():
        manifest = make_manifest(root)
        manifest.change("a", entry(root, "v1").model_copy(update={"version": "0" * 12}))
        manifest = make_manifest(root)
        await manifest.reconcile()
        assert loaded_versions(manifest) == {}
        assert "by now, and not 000000000000" in caplog.text

    asyncio.run(run())


@pytest.mark.parametrize(
    "text", ["", "{", '{"proxies": {"a": {}}}', '{"proxies": {"a": {"path": 3, "version": "x"}}}']
)
def test_a_damaged_file(root, text, caplog):
    """It is reported once and left as it is; loaded proxies stay."""

    async def run():
        manifest = make_manifest(root)
        manifest.change("a", entry(root, "v1"))
        await manifest.proxies.load("a", root / "v1")
        (root / "proxies.json").write_text(text)
        for _ in range(3):
            await manifest.reconcile()
        assert len([record for record in caplog.records if "cannot be read" in record.message]) == 1
        assert list(loaded_versions(manifest)) == ["a"]
        assert not manifest.change("b", entry(root, "v2"))
        assert (root / "proxies.json").read_text() == text

    asyncio.run(run())


def test_paths_in_the_file_do_not_lead_out(root, caplog):
    async def run():
        manifest = make_manifest(root / "v1")
        outside = {"path": "../v2", "version": "x", "shadow": False}
        (root / "v1" / "proxies.json").write_text(json.dumps({"proxies": {"a": outside}}))
        await manifest.reconcile()
        assert loaded_versions(manifest) == {} and "must not contain '..'" in caplog.text

    asyncio.run(run())


def test_where_it_cannot_be_written(root, monkeypatch):
    def disk_full(*_):
        raise OSError(28, "No space left on device")

    manifest, first_entry = make_manifest(root), entry(root, "v1")
    assert manifest.change("a", first_entry)
    monkeypatch.setattr("server.proxy_manifest.os.fsync", disk_full)
    assert not manifest.change("b", entry(root, "v2"))
    assert not manifest.change("a", None)
    assert list(json.loads((root / "proxies.json").read_text())["proxies"]) == ["a"]
    assert not list(root.glob(".proxies.*[!k]"))  # nothing half-written is left


def test_a_lock_that_somebody_keeps_is_not_waited_for(root, monkeypatch, caplog):
    monkeypatch.setattr("server.proxy_manifest.LOCK_SECONDS", 0.2)
    manifest = make_manifest(root)
    with (root / ".proxies.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert not manifest.change("a", entry(root, "v1"))
    assert "was locked by another process" in caplog.text
    assert manifest.change("a", entry(root, "v1"))
