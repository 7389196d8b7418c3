"""Rollouts on several Assent servers, perhaps on other machines: the same seeds give the same responses.

    python -m server --model MODEL --proxy-root /shared/proxies   # on every machine
    python -m training.proxy_ppo --model MODEL ... --rollout servers --servers http://one:8000 http://two:8000 \\
        --proxy-root /shared/proxies

A rollout: the weights are saved below the root, and every server loads them under the name of this run. Every server
takes prompts as fast as it can, so a faster one gets more. The decisions are in the traces. Hidden states are not sent:
the trainer computes them with one forward of the frozen LLM over prompts and responses. They equal those that the
servers used, up to rounding.

A server that fails is retried a few times and then left out; the others take over its part. An error that a server
reports for a request ends the run.
"""

import asyncio
import hashlib
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from proxy.checkpoint import BaseModelId, save
from proxy.network import ProxyConfig, ProxyNetwork
from proxy.positions import Positions, joined
from training.console import TrainingError
from training.model_inputs import HeadInput, pad_responses
from training.policy import Decoding
from training.positions import Response
from training.rollout import Counts, Rollout
from training.server_requests import ask_positions, ask_response, ask_traced
from training.servers import (
    PAUSES,
    Failure,
    ask_every,
    checked,
    content,
    listed,
    message_of,
    share_out,
)
from training.traces import decisions, refuse_untraceable, sampling

# Without these, a server would use the defaults of the model's generation config.
_PLAIN = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
}


_READ_AT_ONCE = 16  # responses in a request


class _Published(NamedTuple):
    """A version of the proxy, and the servers that have loaded it."""

    name: str  # the main process's: other machines would compute another one
    version: str
    urls: list[str]


class ServersBackend:
    """Servers with the frozen LLM and one proxy, whose weights each rollout replaces."""

    def __init__(
        self,
        frozen: PreTrainedModel,
        urls: Sequence[str],
        root: Path,
        base: BaseModelId,
        *,
        name: str,
        max_requests: int,
        batch_size: int,
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            frozen: the LLM in transformers, for hidden states.
            urls: addresses of the servers, `http://host:port`.
            root: the directory that is every server's `--proxy-root`.
            base: the LLM's identity.
            name: of the proxy on the servers, and of its directory below the root; must be unique.
            max_requests: concurrent requests on each server.
            batch_size: responses at once in this device's memory.
            accelerator: of this run's processes: the main process publishes, each sends its own prompts.

        Raises:
            TrainingError: an address is invalid, or the directory does not exist.
        """
        if not root.is_dir():
            raise TrainingError(f"--proxy-root {root}: there is no such directory")
        self._frozen, self._base, self._accelerator = frozen, base, accelerator
        self._urls = [checked(url) for url in urls]
        self._root, self._name = root, name
        self._at_once = max(1, max_requests // accelerator.num_processes)
        self._batch_size = batch_size
        self._is_first = True

    def generate(
        self,
        network: ProxyNetwork,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> Rollout:
        """As `training.rollout.generate`, up to rounding.

        Raises:
            TrainingError: responses may be longer than traces, a server refuses a request, or no server is left.
        """
        refuse_untraceable(decoding, "servers")
        published = self._publish(network)
        bodies = [
            sampling(decoding, end_ids, seed)
            | _PLAIN
            | {"prompt": prompt, "alignment": {"proxy": published.name, "trace": True}}
            for prompt, seed in zip(prompts, islice(seeds, len(prompts)), strict=True)
        ]
        ask = partial(ask_traced, published.version)
        answers = asyncio.run(share_out(published.urls, bodies, ask, self._at_once))
        responses = [answer.response for answer in answers]

        def hidden_at(episodes: Sequence[int], indices: Sequence[int]) -> Tensor:
            return self._hidden_at(prompts, responses, episodes, indices)

        device = self._frozen.device
        decided = decisions([answer.trace for answer in answers], hidden_at, device)
        count_names = ("proposed", "rejected", "forced")
        totals = (sum(answer.counts[name] for answer in answers) for name in count_names)
        return Rollout(responses, decided, Counts(sum(map(len, responses)), *totals), None)

    def responses(
        self,
        network: ProxyNetwork | None,
        prompts: Sequence[list[int]],
        decoding: Decoding,
        *,
        end_ids: Collection[int],
        seeds: Iterable[int],
    ) -> list[list[int]]:
        """The responses only, without decisions; network None = by the frozen LLM.

        Raises:
            TrainingError: a server refuses a request, or no server is left.
        """
        published = self._publish(network) if network is not None else None
        alignment = {"alignment": {"proxy": published.name}} if published else {}
        bodies = [
            sampling(decoding, end_ids, seed) | _PLAIN | {"prompt": prompt} | alignment
            for prompt, seed in zip(prompts, islice(seeds, len(prompts)), strict=True)
        ]
        ask = partial(ask_response, published.version if published else None)
        urls = published.urls if published else self._urls
        return asyncio.run(share_out(urls, bodies, ask, self._at_once))

    def read(self, responses: Sequence[Response], config: ProxyConfig) -> Positions:
        """As `training.positions.read`, up to rounding.

        Raises:
            TrainingError: a server refuses a request, or no server is left.
        """
        names = ("temperature", "top_k", "top_p", "max_candidates")
        nucleus = {name: getattr(config, name) for name in names}
        bodies = [
            {"responses": [response._asdict() for response in responses[i : i + _READ_AT_ONCE]]}
            | nucleus
            for i in range(0, len(responses), _READ_AT_ONCE)
        ]
        at_once = max(1, self._at_once // _READ_AT_ONCE)
        return joined(asyncio.run(share_out(self._urls, bodies, ask_positions, at_once)))

    def close(self) -> None:
        """Unload the proxy and remove its directory; prints a warning for each server that fails."""
        directory = self._root / self._name
        if not self._accelerator.is_main_process or not directory.exists():
            return
        for url, result in asyncio.run(
            ask_every(self._urls, "DELETE", f"/proxies/{self._name}")
        ).items():
            # 404: it was never loaded, or is unloaded already, because servers with the same root synchronise.
            if isinstance(result, Failure) or not (result.is_success or result.status_code == 404):
                message = result.message if isinstance(result, Failure) else message_of(result)
                _say(f"{url} still has the proxy {self._name!r}: {message}")
        shutil.rmtree(directory, ignore_errors=True)

    def _publish(self, network: ProxyNetwork) -> _Published:
        """The main process publishes; the others wait, and fail if it fails."""
        outcomes: list[_Published | TrainingError | None] = [None]
        if self._accelerator.is_main_process:
            try:
                outcomes = [self._load(network)]
            except TrainingError as error:
                outcomes = [error]
        (outcome,) = broadcast_object_list(outcomes)
        if isinstance(outcome, TrainingError):
            raise outcome
        return outcome

    def _load(self, network: ProxyNetwork) -> _Published:
        """Replace the weights on every server that can be reached."""
        directory = self._root / self._name / uuid.uuid4().hex[:8]
        try:
            version = save(directory, network, base=self._base, training={})
        except OSError as error:
            raise TrainingError(f"--proxy-root: {directory} cannot be written: {error}") from error
        body = {"name": self._name, "path": f"{self._name}/{directory.name}"}
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            results = asyncio.run(ask_every(self._urls, "POST", "/proxies", body))
            lost = {
                url: result.message
                for url, result in results.items()
                if isinstance(result, Failure)
            }
            if self._is_first or len(lost) < len(results):
                break
        if lost and (self._is_first or len(lost) == len(results)):
            raise TrainingError(f"--servers: {listed(lost)}")
        if lost:
            _say(f"left out of this rollout: {listed(lost)}")
        urls = [url for url in self._urls if url not in lost]
        for url in urls:
            loaded = content(results[url], url)
            if loaded["version"] != version:
                raise TrainingError(
                    f"{url} has loaded version {loaded['version']}, but {directory} holds {version}: "
                    "--proxy-root must be the same directory for all"
                )
        self._is_first = False
        for old_version in directory.parent.iterdir():  # including those of a killed run
            if old_version != directory:
                shutil.rmtree(old_version, ignore_errors=True)
        return _Published(self._name, version, urls)

    @torch.inference_mode()
    def _hidden_at(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        episodes: Sequence[int],
        indices: Sequence[int],
    ) -> Tensor:
        """The lm_head's input [D, H] at the tokens with these indices."""
        device, size = self._frozen.device, self._batch_size
        episode_indices = torch.tensor(episodes, dtype=torch.long)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        positions = lengths[episode_indices] + torch.tensor(indices, dtype=torch.long) - 1
        chunks = []
        with HeadInput(self._frozen, logits_of_last=True) as head:
            for start in range(0, len(prompts), size):
                ids, _ = pad_responses(
                    prompts[start : start + size], responses[start : start + size]
                )
                self._frozen(input_ids=ids.to(device), use_cache=False)
                in_batch = (start <= episode_indices) & (episode_indices < start + size)
                rows, columns = (
                    (episode_indices[in_batch] - start).to(device),
                    positions[in_batch].to(device),
                )
                chunks.append(head.states[rows, columns])
        return torch.cat(chunks)


def name_of(output: Path) -> str:
    """A name for the proxy of a run, the same after it is resumed."""
    run = f"{socket.gethostname()} {output.resolve()}"
    return f"learner-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _say(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
