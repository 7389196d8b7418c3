"""The rows of the table."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.real.setting import DECODING, Setting
from training.console import TrainingError
from training.policy import Decoding

BASELINE = "frozen-best"
"""What the wins are counted against."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to answer."""

    title: str
    kind: Literal["frozen", "lora", "proxy"] = "frozen"
    job: str | None = None
    """The job that trains it, without its seed."""
    instructed: bool = False
    """Whether it reads the system prompt."""
    judge: str | None = None
    """The judge that chooses among N samples."""
    decoding: Decoding | None = None
    """None = its own best one, searched on validation prompts."""
    searched_as: str | None = None
    """The row whose search it shares; None = its own."""
    first_seed_only: bool = False
    """A pairwise judge reads N - 1 pairs in both orders: too long for three seeds."""


def _best_of(judge: str, title: str, *, first_seed_only: bool = False) -> Method:
    return Method(
        title=f"best of 4 by {title}",
        judge=judge,
        searched_as=None if judge == "probe" else "best-of-probe",
        first_seed_only=first_seed_only,
    )


def _proxy(job: str, title: str) -> Method:
    return Method(title=title, kind="proxy", job=job)


METHODS: dict[str, Method] = {
    "frozen": Method(
        title="frozen, T 1, top-p 0.95",
        decoding=Decoding(
            temperature=1.0, top_k=DECODING.top_k, max_new_tokens=DECODING.max_new_tokens
        ),
    ),
    BASELINE: Method(title="frozen, its best decoding"),
    "system": Method(title="frozen, system prompt", instructed=True),
    "best-of-probe": _best_of("probe", "the probe"),
    "best-of-coherent": _best_of("coherent", "the probe with coherence"),
    "best-of-implicit": _best_of("implicit", "the implicit reward"),
    "best-of-self": _best_of("self", "its own judgment", first_seed_only=True),
    "best-of-jsft": _best_of("jsft", "the JSFT judge", first_seed_only=True),
    "dpo": Method(title="DPO, LoRA", kind="lora", job="dpo"),
    "rlhf": Method(title="full RLHF (PPO), LoRA, probe", kind="lora", job="rlhf"),
    "self-judge": Method(title="SELF-JUDGE, LoRA, JSFT judge", kind="lora", job="self-training"),
    "proxy-ppo": _proxy("proxy-ppo", "**proxy**, PPO, probe"),
    "proxy-probe": _proxy("proxy-probe", "**proxy**, direct, probe"),
    "proxy-implicit": _proxy("proxy-implicit", "**proxy**, direct, implicit reward"),
    "proxy-jsft": _proxy("proxy-jsft", "**proxy**, direct, JSFT judge"),
    "proxy-coherent": _proxy(
        "proxy-coherent", "**proxy**, PPO, probe with coherence, prompts of both kinds"
    ),
    "proxy-best-of": Method(
        title="**proxy**, direct, probe, and best of 4 by it",
        kind="proxy",
        job="proxy-probe",
        judge="probe",
    ),
    "proxy-system": Method(
        title="**proxy**, direct, probe, and system prompt",
        kind="proxy",
        job="proxy-probe",
        instructed=True,
    ),
}


def chosen(setting: Setting) -> dict[str, Method]:
    """The rows to run: those that are named, or all, and the baseline.

    Raises:
        TrainingError: a name is unknown.
    """
    unknown = [name for name in setting.methods if name not in METHODS]
    if unknown:
        raise TrainingError(
            f"--methods {' '.join(unknown)}: unknown; known are {', '.join(METHODS)}"
        )
    return {
        name: method
        for name, method in METHODS.items()
        if name == BASELINE or name in setting.methods or not setting.methods
    }


def seeds_of(setting: Setting, method: Method) -> tuple[int, ...]:
    return setting.seeds[:1] if method.first_seed_only else setting.seeds
