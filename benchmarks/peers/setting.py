"""Options and sizes of the comparison with peers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import PositiveInt

from benchmarks.comparison.jobs import Workplace
from judge.options import PositiveShare

N = 8
"""Of best of N, for everybody."""
AT_ONCE = 16
"""Concurrent requests where nothing is timed."""
WorldName = Literal["toy", "smollm2"]
PeerName = Literal["optillm", "its_hub"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    worlds: tuple[WorldName, ...] = ("toy", "smollm2")
    """The bundled toy data with its LLM, and SmolLM2-135M-Instruct."""
    peers: tuple[PeerName, ...] = ("optillm", "its_hub")
    """Packages to compare with. () = none."""
    optillm: Path | None = None
    """A virtual environment that has optillm. None = make one in the directory of the jobs."""
    its_hub: Path | None = None
    """A virtual environment that has its_hub. None = make one in the directory of the jobs."""
    rows: tuple[str, ...] = ()
    """Rows of the tables, by their names in `benchmarks.peers.rows`. () = all."""
    prompts: tuple[PositiveInt, PositiveInt] = (300, 120)
    """Test prompts of the toy data and for SmolLM2, which has 150."""
    costly: PositiveInt = 60
    """The first of SmolLM2's prompts, for rows that read or write thousands of tokens for each."""
    rounds: PositiveInt = 5
    """Timed rounds; every row has its turn in each."""
    clients: tuple[PositiveInt, ...] = (1, 16)
    """Concurrent clients in the timed rounds; in transformers the size of a batch."""
    work: Path = Path("runs/benchmarks/peers")
    """Directory for the files of the jobs."""
    output: Path = Path("docs/results")
    """Directory for peers_table.md and peers.json."""
    report_only: bool = False
    """Run nothing, and report on what is finished."""
    scale: PositiveShare = 1.0
    """Share of prompts, pairs and rounds."""


@dataclass(frozen=True, kw_only=True)
class Setting(Workplace):
    """Directories and sizes of the comparison in one world."""

    world: WorldName
    num_prompts: int
    num_costly: int
    """Of the prompts, for costly rows."""
    rounds: int
    clients: tuple[int, ...]
    num_pairs: int
    """That the reward, or the judge, is trained on."""
    rows: tuple[str, ...]
    environments: dict[str, Path]
    """The virtual environment of each peer that takes part."""


def scaled(count: int, scale: float, least: int) -> int:
    return max(least, int(count * scale))
