"""Rollouts on several of Assent's servers, on other machines perhaps: for the same seeds the same responses.

    python -m server --model MODEL --proxy-root /shared/proxies   # on every machine
    python -m training.proxy_ppo --model MODEL ... --rollout servers --servers http://one:8000 http://two:8000 \\
        --proxy-root /shared/proxies

A rollout: the weights are saved below the root and loaded by every server under the name of this run; every server
takes as many prompts as it can, so a faster one gets more; the decisions are in the traces. Hidden states do not
travel: the trainer computes them, by one forward of the frozen LLM over prompts and responses. Up to rounding they are
those that the servers decided on.

A server that fails is tried again a few times, and does without its part then; the others do it. What a server refuses
ends the run.
"""

import asyncio
import hashlib
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from proxy.checkpoint import BaseModelId, save
from proxy.network import ProxyNetwork
from training.console import TrainingError
from training.policy import Decoding
from training.rollout import Counts, HeadInput, Rollout, pad_responses
from training.traces import Entry, decisions, refuse_untraceable, sampling

API_KEY = "ASSENT_API_KEY"
"""The environment variable with an administrator's key, for servers that want one."""
PAUSES = (1.0, 2.0, 4.0)  # seconds before a server that has failed is tried again
# A server that says nothing for so long has failed: at first, to being told to load or unload, and to a prompt.
CONNECT_SECONDS, LOAD_SECONDS, ANSWER_SECONDS = 10.0, 120.0, 1800.0

# What else would be a server's own: its defaults are those of the model's generation config.
_PLAIN = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "return_token_ids": True,
}


class _Failure(NamedTuple):
    """A server that is not to be reached, or that says that the fault is its own. It may mend."""

    message: str


class _Published(NamedTuple):
    """A version of the proxy, and the servers that have it."""

    name: str  # the main process's: on another machine it would be another
    version: str
    urls: list[str]


class _Answer(NamedTuple):
    response: list[int]
    trace: list[Entry]
    counts: dict[str, int]


class Servers:
    """Servers with the frozen LLM, and on each of them one proxy, whose weights each rollout brings along."""

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
            urls: where the servers are, `http://host:port`.
            root: the directory that is every server's `--proxy-root`.
            base: the LLM's identity.
            name: of the proxy on the servers, and of its directory below the root: nobody else's.
            max_requests: responses under way at once on each server.
            batch_size: responses at once in this device's memory.
            accelerator: of this run's processes the main one publishes; each sends its own prompts.

        Raises:
            TrainingError: an address or the directory is none.
        """
        if not root.is_dir():
            raise TrainingError(f"--proxy-root {root}: there is no such directory")
        self._frozen, self._base, self._accelerator = frozen, base, accelerator
        self._urls = [_checked(url) for url in urls]
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
        """What `training.rollout.generate` returns for the same, up to the rounding of the LLM's arithmetic.

        Raises:
            TrainingError: responses may be longer than traces are, a server refuses something, or none is left.
        """
        refuse_untraceable(decoding, "servers")
        published = self._publish(network)
        bodies = [
            sampling(decoding, end_ids, seed)
            | _PLAIN
            | {"prompt": prompt, "alignment": {"proxy": published.name, "trace": True}}
            for prompt, seed in zip(prompts, islice(seeds, len(prompts)), strict=True)
        ]
        answers = asyncio.run(self._ask_all(bodies, published))
        responses = [answer.response for answer in answers]

        def hidden_at(episodes: Sequence[int], indices: Sequence[int]) -> Tensor:
            return self._hidden_at(prompts, responses, episodes, indices)

        device = self._frozen.device
        decided = decisions([answer.trace for answer in answers], hidden_at, device)
        names = ("proposed", "rejected", "forced")
        of_all = (sum(answer.counts[name] for answer in answers) for name in names)
        return Rollout(responses, decided, Counts(sum(map(len, responses)), *of_all), None)

    def close(self) -> None:
        """Unload the proxy and remove its directory; what of it cannot be done is said."""
        directory = self._root / self._name
        if not self._accelerator.is_main_process or not directory.exists():
            return
        for url, found in asyncio.run(self._to_all("DELETE", f"/proxies/{self._name}")).items():
            # 404: it was never there, or has gone already, for servers of one root keep in step.
            if isinstance(found, _Failure) or not (found.is_success or found.status_code == 404):
                message = found.message if isinstance(found, _Failure) else _message(found)
                _say(f"{url} still has the proxy {self._name!r}: {message}")
        shutil.rmtree(directory, ignore_errors=True)

    def _publish(self, network: ProxyNetwork) -> _Published:
        """Done by the main process; the others wait for it, and fail as it fails."""
        found: list[_Published | TrainingError | None] = [None]
        if self._accelerator.is_main_process:
            try:
                found = [self._load(network)]
            except TrainingError as error:
                found = [error]
        (outcome,) = broadcast_object_list(found)
        if isinstance(outcome, TrainingError):
            raise outcome
        return outcome

    def _load(self, network: ProxyNetwork) -> _Published:
        """Put these weights in the place of the last ones, on every server that can be reached."""
        directory = self._root / self._name / uuid.uuid4().hex[:8]
        try:
            version = save(directory, network, base=self._base, training={})
        except OSError as error:
            raise TrainingError(f"--proxy-root: {directory} cannot be written: {error}") from error
        body = {"name": self._name, "path": f"{self._name}/{directory.name}"}
        for pause in (0.0, *PAUSES):
            time.sleep(pause)
            found = asyncio.run(self._to_all("POST", "/proxies", body))
            lost = {url: one.message for url, one in found.items() if isinstance(one, _Failure)}
            if self._is_first or len(lost) < len(found):
                break
        if lost and (self._is_first or len(lost) == len(found)):
            raise TrainingError(f"--servers: {_listed(lost)}")
        if lost:
            _say(f"left out of this rollout: {_listed(lost)}")
        urls = [url for url in self._urls if url not in lost]
        for url in urls:
            loaded = _content(found[url], url)
            if loaded["version"] != version:
                raise TrainingError(
                    f"{url} has loaded version {loaded['version']}, but {directory} holds {version}: "
                    "--proxy-root must be the same directory for all"
                )
        self._is_first = False
        for old in directory.parent.iterdir():  # those of a run that was killed are among them
            if old != directory:
                shutil.rmtree(old, ignore_errors=True)
        return _Published(self._name, version, urls)

    async def _to_all(
        self, method: str, path: str, body: Any = None
    ) -> dict[str, httpx.Response | _Failure]:
        async with _client(LOAD_SECONDS) as http:
            found = await asyncio.gather(
                *(_send(http, method, url + path, body) for url in self._urls)
            )
        return dict(zip(self._urls, found, strict=True))

    async def _ask_all(self, bodies: Sequence[Any], published: _Published) -> list[_Answer]:
        """One answer to each. Each server takes from the same queue; what it fails at goes back there."""
        answers: dict[int, _Answer] = {}
        waiting: asyncio.Queue[int] = asyncio.Queue()
        lost: dict[str, str] = {}
        for number in range(len(bodies)):
            waiting.put_nowait(number)

        async def work(http: httpx.AsyncClient, url: str) -> None:
            """One request after the other, until it has failed too often in a row."""
            pauses = iter(PAUSES)
            while True:
                number = await waiting.get()
                found = await self._ask(http, url, bodies[number], published.version)
                if isinstance(found, _Answer):
                    answers[number], pauses = found, iter(PAUSES)
                else:
                    waiting.put_nowait(number)
                waiting.task_done()
                if isinstance(found, _Failure):
                    lost[url] = found.message
                    if (pause := next(pauses, None)) is None:
                        return
                    await asyncio.sleep(pause)

        async with _client(ANSWER_SECONDS) as http:
            workers = [
                asyncio.create_task(work(http, url))
                for _ in range(self._at_once)
                for url in published.urls
            ]
            all_done = asyncio.create_task(waiting.join())
            try:
                running = {all_done, *workers}
                while not all_done.done() and running != {all_done}:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()  # a refusal
            finally:
                for task in (all_done, *workers):
                    task.cancel()
                await asyncio.gather(all_done, *workers, return_exceptions=True)
        if len(answers) < len(bodies):
            raise TrainingError(f"no server is left: {_listed(lost)}")
        return [answers[number] for number in range(len(bodies))]

    async def _ask(
        self, http: httpx.AsyncClient, url: str, body: dict[str, Any], version: str
    ) -> _Answer | _Failure:
        """
        Raises:
            TrainingError: the server refuses, or its answer does not tell all that was decided.
        """
        answer = await _send(http, "POST", f"{url}/v1/completions", body)
        if isinstance(answer, _Failure):
            return answer
        found = _content(answer, url)
        receipt, response = found["alignment"], found["choices"][0]["token_ids"]
        if receipt["version"] != version:  # which servers that keep in step may mend
            return _Failure(f"it answers with version {receipt['version']}, and not {version}")
        (trace,) = receipt["trace"]
        if receipt["trace_truncated"] or [entry["token_id"] for entry in trace] != response:
            raise TrainingError(
                f"{url} has dropped a part of a trace, as it does when too many are asked for at once: "
                "lower --server-requests, or take its other clients away"
            )
        if len(response) < body["max_tokens"] and response[-1] not in body["stop_token_ids"]:
            raise TrainingError(
                f"{url} has ended a response after {len(response)} tokens: neither its --max-model-len nor the "
                f"max_new_tokens of its generation config may be in the way of {body['max_tokens']} tokens"
            )
        return _Answer(response, trace, receipt)

    @torch.inference_mode()
    def _hidden_at(
        self,
        prompts: Sequence[list[int]],
        responses: Sequence[list[int]],
        episodes: Sequence[int],
        indices: Sequence[int],
    ) -> Tensor:
        """What the lm_head read where the tokens of these indices were drawn: [D, H]."""
        device, size = self._frozen.device, self._batch_size
        of = torch.tensor(episodes, dtype=torch.long)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        positions = lengths[of] + torch.tensor(indices, dtype=torch.long) - 1
        found = []
        with HeadInput(self._frozen, logits_of_last=True) as head:
            for start in range(0, len(prompts), size):
                ids, _ = pad_responses(
                    prompts[start : start + size], responses[start : start + size]
                )
                self._frozen(input_ids=ids.to(device), use_cache=False)
                some = (start <= of) & (of < start + size)
                rows, columns = (of[some] - start).to(device), positions[some].to(device)
                found.append(head.states[rows, columns])
        return torch.cat(found)


def name_of(output: Path) -> str:
    """A name for the proxy of a run: its own, and that of the run that goes on after a kill."""
    run = f"{socket.gethostname()} {output.resolve()}"
    return f"learner-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _client(seconds: float) -> httpx.AsyncClient:
    key = os.environ.get(API_KEY)
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None),
    )


async def _send(
    http: httpx.AsyncClient, method: str, url: str, body: Any
) -> httpx.Response | _Failure:
    try:
        response = await http.request(method, url, json=body)
    except httpx.TransportError as error:
        return _Failure(f"it cannot be reached ({error or type(error).__name__})")
    return _Failure(_message(response)) if response.is_server_error else response


def _content(response: Any, url: str) -> dict[str, Any]:
    """
    Raises:
        TrainingError: the server refuses.
    """
    if not response.is_success:
        raise TrainingError(f"{url} refuses: {_message(response)}")
    return response.json()


def _message(response: httpx.Response) -> str:
    """The server's own words, where it has any."""
    try:
        said = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = response.text[:200]
    return f"{response.status_code} {said}"


def _checked(url: str) -> str:
    """
    Raises:
        TrainingError: it is no address of a server.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TrainingError(f"--servers {url}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TrainingError(f"--servers {url}: an address is http://host:port")
    return url.rstrip("/")


def _listed(lost: dict[str, str]) -> str:
    return "; ".join(f"{url}: {message}" for url, message in lost.items())


def _say(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
