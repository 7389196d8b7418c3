"""A worker that writes its proxies into a file, and whose second engine has no room for one directory."""

import json
import os
from pathlib import Path
from typing import Any

from proxy.engine.ranks import raised_by_last_rank
from proxy.worker import ProxyCPUWorker


class FaultyWorker(ProxyCPUWorker):
    @raised_by_last_rank
    def load_proxy(self, name: str, directory: str, shadow: bool = False) -> dict[str, Any]:
        if self.parallel_config.data_parallel_index == 1 and Path(directory).name == "poison":
            raise MemoryError("no room on the second engine")
        description = super().load_proxy(name, directory, shadow)
        self._write_loaded()
        return description

    @raised_by_last_rank
    def unload_proxy(self, name: str, version: str | None = None) -> dict[str, Any]:
        description = super().unload_proxy(name, version)
        self._write_loaded()
        return description

    def _write_loaded(self) -> None:
        entries = [(entry["name"], entry["version"]) for entry in self._registry.list()]
        path = Path(os.environ["TESTS_LOADED"]) / str(self.parallel_config.data_parallel_index)
        path.write_text(json.dumps(sorted(entries)))
