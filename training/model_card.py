"""Model cards: the `README.md` of a directory that a training command writes, as the Hub reads it.

A card is what a person needs who finds the directory without us: what it is, for which LLM, from which data, by which
command, how good, how to serve it, and what it cannot do. `training.run_card` makes the card of a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from proxy.checkpoint import BaseModelId
from proxy.network import ProxyConfig
from training.card_texts import LIMITS, USE, WHAT, Kind

CARD_FILE = "README.md"
UNKNOWN_LICENSE = "unknown"
"""The Hub's word for it."""

_SCORES = "figure | value | measured on"
_ADAPTERS = ("proxy", "probe", "adapter", "adapter judge", "adapter reward")


class DataFile(NamedTuple):
    """Data that a training read."""

    option: str
    source: str
    """A path, or a data set's name on the Hub."""
    rows: int | None = None
    sha256: str = ""
    """Of the file, as `sha256sum` prints it."""


class Score(NamedTuple):
    """A measured figure."""

    name: str
    value: float
    error: float | None = None
    """Its standard error."""
    size: int | None = None
    """Of the sample."""
    of: str = ""
    """What it is a sample of."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that a card says."""

    name: str
    kind: Kind
    base: BaseModelId
    base_model: str | None = None
    """The LLM's id on the Hub; None = it is not from there."""
    license: str = UNKNOWN_LICENSE
    datasets: Sequence[str] = ()
    """Ids on the Hub."""
    about: str = ""
    """A paragraph about this one."""
    parameters: int | None = None
    """That were trained."""
    data: Sequence[DataFile] = ()
    command: str = ""
    settings: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Option -> (value, default), of options that differ."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The last row of the training's metrics."""
    files: Sequence[str] = ()
    """Names of the files of metrics and curves beside the card."""
    scores: Sequence[Score] = ()
    decoding: ProxyConfig | None = None
    """Of a proxy."""
    serve: str = ""
    """Command that serves it; empty = that of its kind."""
    limits: Sequence[str] = ()
    """Beyond those of its kind."""

    def text(self) -> str:
        """The card, with the Hub's metadata first."""
        parts = [
            f"# {self.name}",
            self._what(),
            self._base(),
            _section("Data", self._data()),
            _section("Settings", self._settings()),
            _section("Curves", self._curves()),
            _section("Scores", _table(_SCORES, map(_score_row, self.scores))),
            _section("Decoding", self._decoding()),
            _section("Use", self._use()),
            _section(
                "Limits", "\n".join(f"- {limit}" for limit in (*LIMITS[self.kind], *self.limits))
            ),
            _section("Licence", self._licence()),
        ]
        body = "\n\n".join(part for part in parts if part)
        return str(ModelCard(f"---\n{self._metadata().to_yaml()}\n---\n\n{body}\n"))

    def write(self, directory: Path) -> None:
        (directory / CARD_FILE).write_text(self.text(), encoding="utf-8")

    def _metadata(self) -> ModelCardData:
        tags = ["assent", "alignment", *self.kind.replace("adapter", "lora").split()]
        if self.kind == "proxy":
            tags.append("proxy-rlhf")
        more: dict[str, Any] = {}
        if self.base_model is not None:
            more["base_model_relation"] = "adapter" if self.kind in _ADAPTERS else "finetune"
        return ModelCardData(
            base_model=self.base_model,
            library_name="assent",
            license=self.license,
            datasets=[*self.datasets] or None,
            tags=tags,
            **more,
        )

    def _what(self) -> str:
        what = WHAT[self.kind].format(base=f"`{self.base_model or self.base.name}`")
        if self.parameters is not None:
            what += f" {self.parameters:,} parameters were trained."
        return f"{what}\n\n{self.about}" if self.about else what

    def _base(self) -> str:
        return _section(
            "Base LLM",
            f"`{self.base_model or self.base.name}`, with fingerprint `{self.base.fingerprint}` (a hash of the names, "
            "types, shapes and first bytes of its tensors).",
        )

    def _data(self) -> str:
        rows = (
            (
                f"`--{file.option}`",
                f"`{file.source}`",
                "" if file.rows is None else f"{file.rows:,}",
                f"`{file.sha256}`" if file.sha256 else "",
            )
            for file in self.data
        )
        return _table("option | source | rows | sha256", rows)

    def _settings(self) -> str:
        command = f"```bash\n{self.command}\n```" if self.command else ""
        rows = (
            (f"`--{name}`", f"`{value}`", f"`{default}`")
            for name, (value, default) in self.settings.items()
        )
        differing = _table("option | value | default", rows)
        if differing:
            differing = f"All other options have their defaults.\n\n{differing}"
        return "\n\n".join(part for part in (command, differing) if part)

    def _curves(self) -> str:
        rows = (
            (f"`{name}`", _shown(value))
            for name, value in self.metrics.items()
            if isinstance(value, int | float)
        )
        parts = [_table("last row | value", rows)]
        parts += [f"![Curves]({name})" for name in self.files if name.endswith(".png")]
        others = [f"`{name}`" for name in self.files if not name.endswith(".png")]
        if others:
            parts.append(f"All rows are in {' and '.join(others)}.")
        return "\n\n".join(part for part in parts if part)

    def _decoding(self) -> str:
        network = self.decoding
        if network is None:
            return ""
        rows = [
            ("T₀, the temperature that it was trained at", f"{network.temperature:g}"),
            ("top-k", str(network.top_k or "none")),
            ("top-p", f"{network.top_p:g}"),
            ("K, candidates at a position at most", str(network.max_candidates)),
            ("rejections at a position at most", str(network.max_rejections)),
        ]
        return (
            _table("setting | value", rows)
            + "\n\nA request may use any temperature. Its top-k and top-p narrow this nucleus and never widen it."
        )

    def _use(self) -> str:
        model = self.base_model or "MODEL"
        command = self.serve or USE[self.kind].format(model=model, name=self.name)
        text = f"```bash\n{command}\n```"
        if not self.serve:
            where = "`DIR` is this directory, or the id of its repository on the Hub"
            if self.base_model is None and "MODEL" in command:
                where += "; `MODEL` is the base LLM's directory"
            text = f"{where}.\n\n{text}"
        if self.kind == "proxy":
            text += f'\n\nA request chooses it with `"alignment": {{"proxy": "{self.name}"}}`, or with the model name '
            text += (
                f"`<model>:{self.name}`. `strength` 0 is the frozen LLM, 1 the proxy as trained."
            )
        return text

    def _licence(self) -> str:
        if self.license != UNKNOWN_LICENSE:
            return f"`{self.license}`"
        return (
            "Not stated yet. Whoever publishes this sets `license` above; the licences of the LLM and of the data may "
            "bind them."
        )


def add_scores(text: str, scores: Sequence[Score]) -> str:
    """A card's text with more scores; those of the same figure, measured on the same, are replaced."""
    new = [_score_row(score) for score in scores]
    lines = text.splitlines()
    if "## Scores" not in lines:
        place = next(i for i, line in enumerate(lines) if line in ("## Decoding", "## Use"))
        lines[place:place] = ["## Scores", "", f"| {_SCORES} |", "|---|---|---|", ""]
    end = start = lines.index("## Scores") + 4  # after a blank line and the table's head
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    replaced = {(name, of) for name, _, of in new}
    old = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start:end]]
    rows = [*(row for row in old if (row[0], row[-1]) not in replaced), *new]
    lines[start:end] = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(head: str, rows: Any) -> str:
    """A table in Markdown; empty without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *lines])


def _score_row(score: Score) -> tuple[str, str, str]:
    error = "" if score.error is None else f" ± {_shown(score.error)}"
    size = "" if score.size is None else f"{score.size:,} "
    return score.name, f"{_shown(score.value)}{error}", f"{size}{score.of}"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
