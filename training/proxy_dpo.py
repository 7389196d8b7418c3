"""Train a proxy straight from preferences, with DPO's loss on what accept/reject sampling emits.

    python -m training.proxy_dpo --model runs/base --preferences preferences.jsonl --output runs/proxy
    python -m training.proxy_dpo --model runs/base --prompts prompts.jsonl --reward runs/reward --output runs/proxy

The token that a proxy lets through has a probability in closed form (`proxy.exact`), which can be differentiated by
the proxy's weights. So the loss of DPO, IPO, SimPO or KTO is taken of the proxy itself: the policy is the frozen LLM
with it, the reference the frozen LLM without. The LLM is run once over the responses, for hidden states and candidates;
what follows takes seconds.

`--preferences` has pairs (`prompt`, `chosen`, `rejected`, or any other layout that all commands read, such as
`training.export` writes of the server's feedback), or single verdicts (`prompt`, `completion`, `label`), which are
learned with KTO's loss. With `--prompts` the LLM answers each prompt `--samples` times and the reward ranks its
answers: the best and the worst make a pair, the second and the last but one another, and so on. That is the better way
where the preferences are of texts that this LLM would not write: a proxy chooses among what the LLM proposes, and
tokens outside its nucleus teach nothing. `--rounds` samples again, from the proxy of the round before.

What is left out for `None` among the options depends on the number of preferences.

`--resume` goes on with the samples and hidden states of a run that was killed. With several processes (`accelerate
launch -m training.proxy_dpo ...`) each takes its share, and the result is that of one.
"""

import json
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from judge.options import NonNegative, Positive, Seed
from proxy.checkpoint import CONFIG_FILE, WEIGHTS_FILE, identify, resolve_model_dir, save
from proxy.network import ProxyNetwork
from training import output
from training.console import TrainingError, main_guard, read_options
from training.data import RowOptions
from training.direct import Fit, Settings, sized_for
from training.engines import EngineOptions, make_engine, refuse_half_named_servers
from training.machine import say
from training.memory import MOST_TOKENS, responses_at_once
from training.metrics import METRICS_FILES, Metrics
from training.models import (
    Conversations,
    context_of,
    end_ids,
    load_model,
    load_tokenizer,
    read_config,
    refuse_unknown,
)
from training.output import Run, write_whole
from training.policy import Decoding, Policy, default_config
from training.positions import Cache, Positions, Response
from training.preferences import Collection, Preferences, rank, read_preferences, split
from training.proxy_ppo import decoding_of
from training.rewards import Frozen, load_reward, reward_bytes
from training.rollout import generate
from training.rollout_servers import Servers
from training.sizes import sizes_of
from training.updates import Prompt, read_prompts, samples_of, start

POSITIONS, SAMPLES = "positions", "samples"
WRITES = (
    *(*METRICS_FILES, WEIGHTS_FILE, CONFIG_FILE),
    *(f"{POSITIONS}/*", f"{SAMPLES}/*.jsonl"),
)
READS = ("model", "preferences", "held_out", "prompts", "reward")
MOST_OUTSIDE = 0.1
"""Of all tokens outside the nucleus: more of them teach a proxy little."""
_ASIDE, _FEW = 500, 500  # preferences: set aside at most, and too few to set any aside


@dataclass(frozen=True, kw_only=True)
class Options(RowOptions, EngineOptions):
    """Options of training a proxy on preferences."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    output: Path
    """Directory for the checkpoint, its metrics, and what `--resume` goes on from."""
    preferences: str | None = None
    """JSON lines or Parquet of pairs or of single verdicts, or a data set's name."""
    held_out: str | None = None
    """Preferences to stop by and to measure on; none = a tenth of all, at most 500, where there are 500 or more:
    fewer would choose by chance."""
    max_rows: PositiveInt | None = None
    """Only the first so many preferences, or prompts."""
    prompts: str | None = None
    """In the place of preferences: prompts for the LLM to answer."""
    reward: str | None = None
    """What ranks its answers; as `training.proxy_ppo` takes it."""
    samples: Annotated[int, Field(ge=2)] = 6
    """Answers to each prompt, in each round."""
    rounds: PositiveInt = 1
    """From the second on the proxy of the round before answers."""
    loss: Literal["auto", "dpo", "ipo", "simpo", "kto"] = "auto"
    """auto = dpo of pairs, kto of single verdicts."""
    beta: Positive = 0.3
    """β: the higher, the nearer to the frozen LLM."""
    kl_weight: NonNegative = 0.0
    """Price of a nat of KL(proxied ‖ frozen) in a response."""
    caution_weight: NonNegative = 0.1
    """Price of rejecting even the best candidate: of (log a)², at each position."""
    learning_rate: Positive = 2e-3
    """AdamW's, falling linearly to 0."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    epochs: PositiveInt | None = None
    """Passes over the preferences; the best by the held-out loss counts."""
    batch_size: PositiveInt | None = None
    """Preferences in a gradient step."""
    weight_decay: NonNegative | None = None
    """AdamW's."""
    width: Annotated[int, Field(ge=2)] | None = None
    """Width of the proxy's layers."""
    max_candidates: PositiveInt = 16
    """K: candidates of a position, at most."""
    max_rejections: NonNegativeInt | None = None
    """Rejections at a position, at most; none = all candidates may be rejected. Fewer make training slower."""
    use_logprob: bool = True
    """Whether the proxy sees the candidate's log-probability."""
    decoding: Decoding = field(default_factory=Decoding)
    """The nucleus within which the proxy chooses, and how answers are sampled."""
    max_length: PositiveInt = 1024
    """Preferences with a longer response, its prompt included, in tokens, are left out and counted."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out and counted."""
    responses_at_once: PositiveInt = 64
    """Answers sampled and scored at once, at most."""
    cache: Path | None = None
    """Directory for hidden states, which other runs may share; none = `positions` in the output directory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the frozen LLM computes in."""
    resume: bool = False
    """Go on with the samples and hidden states in the output directory."""
    overwrite: bool = False
    """Replace what an earlier run of this command left in the output directory; other files stay."""
    seed: Seed = 0
    """Of weights, order, samples, and what is set aside."""


class Trainer:
    """Samples, reads and fits, beside a frozen LLM."""

    def __init__(self, options: Options, accelerator: Accelerator) -> None:
        refuse_mixed(options)
        self.options, self.accelerator = options, accelerator
        self.base = identify(options.model)
        directory = str(resolve_model_dir(options.model))
        dtype = getattr(torch, options.dtype)
        self.tokenizer, config = load_tokenizer(directory), read_config(directory)
        self.prompts: list[Prompt] = []
        self.batch_size = options.responses_at_once
        if options.prompts is not None:
            source, limit = options.prompts, options.max_rows
            self.prompts = read_prompts(source, options, self.tokenizer, config, limit)
            self.longest = max(len(prompt.ids) for prompt in self.prompts)
            assert options.reward is not None, "refused at the start"
            self.batch_size = responses_at_once(
                sizes_of(directory),
                options.responses_at_once,
                self.longest,
                options.decoding.max_new_tokens,
                dtype.itemsize,
                reward_bytes(options.reward, dtype) + options.engine_bytes(),
            )
        self.model = load_model(directory, dtype=dtype)[0]
        self.model.to(accelerator.device).eval().requires_grad_(False)
        self.end_ids = end_ids(self.model, self.tokenizer)
        self.config = default_config(
            self.model,
            **decoding_of(options.decoding),
            width=options.width or 64,
            max_candidates=options.max_candidates,
            max_rejections=(
                options.max_candidates if options.max_rejections is None else options.max_rejections
            ),
            use_logprob=options.use_logprob,
        )
        self.embeddings = self.model.get_input_embeddings().weight.detach()
        self.cache = Cache(options.cache or options.output / POSITIONS, self.base, accelerator)

    def train(self, run: Run) -> None:
        """Read or sample the preferences, fit a proxy to them, and save it."""
        if self.prompts:
            self._from_prompts(run)
        else:
            self._from_preferences(run)

    def _from_preferences(self, run: Run) -> None:
        options = self.options
        assert options.preferences is not None, "refused at the start"
        whole = self._read(options.preferences)
        if options.held_out is not None:
            train, held_out = together(whole, self._read(options.held_out))
        else:
            train, held_out = self._set_aside(whole)
        responses = train.responses
        refuse_unknown(
            self.model, self.tokenizer, (each.prompt + each.response for each in responses)
        )
        run.start()
        with self._metrics() as metrics:
            self._save(*self._fit(train, held_out, metrics))

    def _from_prompts(self, run: Run) -> None:
        options, network = self.options, None
        refuse_unknown(self.model, self.tokenizer, (prompt.ids for prompt in self.prompts))
        frozen = Frozen(
            self.model,
            self.tokenizer,
            self.base,
            options.decoding,
            self.end_ids,
            self.batch_size,
        )
        assert options.reward is not None, "refused at the start"
        self.reward = load_reward(options.reward, frozen)
        self.engine = make_engine(
            options,
            self.model,
            self.base,
            self.accelerator,
            longest=self.longest,
            responses=len(self.prompts) * options.samples,
            batch_size=self.batch_size,
        )
        run.start()
        answers: list[list[tuple[list[int], float]]] = [[] for _ in self.prompts]
        closes = closing(self.engine) if isinstance(self.engine, Servers) else nullcontext()
        with closes, self._metrics() as metrics:
            for number in range(options.rounds):
                sampled = list(self._sampled(number, network))
                for index, some in sampled:
                    answers[index] += some
                rewards = [reward for _, some in sampled for _, reward in some]
                say(f"round {number + 1}: mean reward {fmean(rewards):.3f}")
                run.saved = f"round {number + 1} of {options.rounds}"
                found = Collection()
                for prompt, some in zip(self.prompts, answers, strict=True):
                    responses = [Response(prompt.ids, ids) for ids, _ in some]
                    for better, worse in rank(responses, [reward for _, reward in some]):
                        found.add_pair(responses[better], responses[worse])
                if not found.found.pairs:
                    raise TrainingError(
                        "the reward gives all answers to a prompt the same score: there is nothing to learn"
                    )
                network, last = self._fit(*self._set_aside(found.found), metrics)
        assert network is not None, "there is a round"
        self._save(network, last)

    def _read(self, source: str) -> Preferences:
        options, longest = self.options, min(self.options.max_length, context_of(self.model))
        chats = Conversations(self.tokenizer)
        return read_preferences(source, chats, self.end_ids, longest, options, options.max_rows)

    def _set_aside(self, whole: Preferences) -> tuple[Preferences, Preferences]:
        count = 0 if len(whole) < _FEW else min(_ASIDE, len(whole) // 10)
        return split(whole, count, self.options.seed)

    def _metrics(self) -> Any:
        is_main = self.accelerator.is_main_process
        return Metrics(self.options.output) if is_main else nullcontext()

    def _sampled(
        self, number: int, network: ProxyNetwork | None
    ) -> Iterator[tuple[int, list[tuple[list[int], float]]]]:
        """Of each prompt its answers and their rewards, in a round; what a killed run has sampled is read."""
        options, accelerator = self.options, self.accelerator
        directory = options.output / SAMPLES
        count = max(1, 512 // options.samples)  # prompts in a file
        starts = range(0, len(self.prompts), count)
        desc = f"round {number + 1}: answers"
        for part, first in enumerate(
            tqdm(starts, desc=desc, disable=not accelerator.is_main_process)
        ):
            path = directory / f"{number:02}-{part:05}.jsonl"
            if not path.is_file():
                lines = self._sample(first, self.prompts[first : first + count], number, network)
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines))
            accelerator.wait_for_everyone()
            for line in path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                pairs = list(zip(row["responses"], row["rewards"], strict=True))
                yield row["prompt"], pairs

    def _sample(
        self, first: int, prompts: list[Prompt], number: int, network: ProxyNetwork | None
    ) -> list[dict[str, Any]]:
        """Answers of all processes to some prompts, from the `first` on, and their rewards."""
        options = self.options
        size = options.samples
        with self.accelerator.split_between_processes(list(enumerate(prompts, first))) as mine:
            repeated = [prompt for _, prompt in mine for _ in range(size)]
            seeds = [
                (options.seed << 40) + (number << 32) + index * size + i
                for index, _ in mine
                for i in range(size)
            ]
            ids = [prompt.ids for prompt in repeated]
            responses = self._respond(network, ids, seeds)
            samples = samples_of(self.tokenizer, repeated, responses)
            rewards = self.reward(samples).tolist()
            lines = [
                {
                    "prompt": index,
                    "messages": prompt.messages,
                    "texts": [sample.text for sample in samples[i * size : (i + 1) * size]],
                    "rewards": rewards[i * size : (i + 1) * size],
                    "responses": responses[i * size : (i + 1) * size],
                }
                for i, (index, prompt) in enumerate(mine)
            ]
        return gather_object(lines)

    def _respond(
        self, network: ProxyNetwork | None, prompts: list[list[int]], seeds: list[int]
    ) -> list[list[int]]:
        decoding, ends = self.options.decoding, self.end_ids
        if self.engine is not None:
            return self.engine.responses(network, prompts, decoding, end_ids=ends, seeds=seeds)
        policy = Policy(self.model, network)
        rollout = generate(
            policy, prompts, decoding, end_ids=ends, seeds=seeds, batch_size=self.batch_size
        )
        return rollout.responses

    def _fit(
        self, train: Preferences, held_out: Preferences, metrics: Metrics | None
    ) -> tuple[ProxyNetwork, dict[str, Any]]:
        """The best proxy, and its figures."""
        options = self.options
        most = MOST_TOKENS[self.accelerator.device.type]
        positions = self.cache.read(self.model, train.responses, self.config, most)
        describe(positions)
        sized = sized_for(len(train))
        width = options.width or sized.width
        settings = Settings(
            loss=loss_of(options, train),
            beta=options.beta,
            kl_weight=options.kl_weight,
            caution_weight=options.caution_weight,
            learning_rate=options.learning_rate,
            max_grad_norm=options.max_grad_norm,
            epochs=options.epochs or sized.epochs,
            batch_size=options.batch_size or sized.batch_size,
            weight_decay=(
                sized.weight_decay if options.weight_decay is None else options.weight_decay
            ),
            seed=options.seed,
        )
        config = self.config.model_copy(update={"width": width})
        fit = Fit(config, self.embeddings, positions, settings, self.accelerator)
        say(
            f"{len(train)} preferences to learn from, {len(held_out)} held out; "
            f"{fit.network.num_parameters():,} parameters train, {self.model.num_parameters():,} stay frozen"
        )
        rows = fit.epochs(train, held_out)
        bar = tqdm(rows, total=settings.epochs, unit="epoch", disable=metrics is None)
        for row in bar:
            bar.set_postfix({"loss": f"{row['loss']:.3f}"})
            if metrics is not None:
                metrics.add(row | {"step": len(metrics.rows) + 1})
        if len(held_out):
            report(fit.best_row, len(held_out))
        return fit.best, fit.best_row

    def _save(self, network: ProxyNetwork, last: dict[str, Any]) -> None:
        if not self.accelerator.is_main_process:
            return
        training = {"options": output.settings_of(self.options, ()), "last": last}
        version = save(self.options.output, network, base=self.base, training=training)
        print(f"{self.options.output}: version {version}")


def loss_of(options: Options, preferences: Preferences) -> Any:
    """
    Raises:
        TrainingError: the loss is one of pairs, and there are verdicts.
    """
    if options.loss == "auto":
        return "kto" if preferences.verdicts else "dpo"
    if preferences.verdicts and options.loss != "kto":
        raise TrainingError(
            f"--loss {options.loss} is of pairs, and {options.preferences} has single verdicts: use kto"
        )
    return options.loss


def report(row: dict[str, float], count: int) -> None:
    """Say how good a reward the proxy is."""
    share = row["held_out_accuracy"]
    error = (share * (1 - share) / count) ** 0.5
    say(
        f"after pass {row['step']:.0f}: {share:.1%} ± {error:.1%} of {count} held-out preferences are ordered rightly "
        f"by Σ log π/p, at {row['held_out_kl']:.2f} nats of KL a response"
    )


def describe(positions: Positions) -> None:
    """Say how much of the responses the LLM would have written itself.

    Raises:
        TrainingError: there is nothing to choose.
    """
    if not len(positions.slots):
        raise TrainingError(
            "every position has a single candidate, or a token outside the nucleus: raise --decoding.top-k or "
            "--decoding.top-p"
        )
    share, tokens = positions.share_outside, int(positions.tokens.sum())
    say(
        f"{len(positions.counts):,} responses of {tokens:,} tokens, {len(positions.slots):,} of which leave a choice; "
        f"{share:.1%} lie outside the LLM's nucleus"
    )
    if share > MOST_OUTSIDE:
        say(
            "warning: these are not what this LLM would write, and a proxy learns little from them: have it answer "
            "itself, with --prompts and --reward, or widen the nucleus with --decoding.top-p and --max-candidates"
        )


def together(train: Preferences, held_out: Preferences) -> tuple[Preferences, Preferences]:
    """Both as parts of the same responses."""
    first = len(train.responses)
    responses = [*train.responses, *held_out.responses]
    pairs = [(better + first, worse + first) for better, worse in held_out.pairs]
    verdicts = [(index + first, good) for index, good in held_out.verdicts]
    return replace(train, responses=responses), Preferences(responses, pairs, verdicts)


def refuse_mixed(options: Options) -> None:
    """
    Raises:
        TrainingError: neither preferences nor prompts with a reward are given, or both.
    """
    refuse_half_named_servers(options)
    if (options.preferences is None) == (options.prompts is None):
        raise TrainingError(
            "give --preferences, or --prompts and --reward: one of the two is learned from"
        )
    if (options.prompts is None) != (options.reward is None):
        raise TrainingError("--prompts and --reward go together: the reward ranks the answers")
    if options.prompts is None and options.rollout not in ("auto", "transformers"):
        raise TrainingError(
            f"--rollout {options.rollout} samples answers to --prompts, and there are none"
        )


def main(options: Options) -> None:
    with output.run(options, "training.proxy_dpo", reads=READS, writes=WRITES) as run:
        if not run.is_finished:
            Trainer(options, start()).train(run)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
