"""Train a proxy on preferences, with DPO's loss on the distribution that accept/reject sampling emits.

    python -m training.proxy_dpo --model runs/base --preferences preferences.jsonl --output runs/proxy
    python -m training.proxy_dpo --model runs/base --prompts prompts.jsonl --reward runs/reward --output runs/proxy

The probability of the emitted token has a closed form (`proxy.exact`), which is differentiable in the proxy's weights.
So the loss of DPO, IPO, SimPO or KTO applies to the proxy itself: the policy is the frozen LLM with the proxy, the
reference is the frozen LLM without it. The LLM runs once over the responses, for hidden states and candidates; the
training that follows takes seconds.

`--preferences` has pairs (`prompt`, `chosen`, `rejected`, or any other layout that all commands read, such as the
output of `training.export`), or single verdicts (`prompt`, `completion`, `label`), which use KTO's loss. With
`--prompts` the LLM answers each prompt `--samples` times, the reward ranks the answers, and any two of them form a
pair. Use that if the preferences are about texts that this LLM would not generate: a proxy chooses among the LLM's
candidates, and tokens outside the nucleus teach it nothing.
`--rounds` samples again, from the proxy of the previous round.

Options whose default is `None` depend on the number of preferences.

`--resume` continues with the samples and hidden states of a killed run. With several processes (`accelerate launch -m
training.proxy_dpo ...`) each takes its share, and the result is that of one process.

The file is longer than 300 lines because a third of it is options.
"""

from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from judge.options import NonNegative, Positive, Seed
from proxy.checkpoint import CONFIG_FILE, WEIGHTS_FILE, identify, resolve_model_dir, save
from proxy.network import ProxyNetwork
from training import output
from training.console import TrainingError, main_guard, read_options
from training.conversations import Conversations
from training.direct import Fit, Row, Settings, sized_for
from training.machine import print_once
from training.memory import responses_at_once
from training.metrics import METRICS_FILES, Metrics
from training.model_card import CARD_FILE
from training.models import (
    context_of,
    end_ids,
    load_model,
    load_tokenizer,
    read_config,
    refuse_unknown,
)
from training.on_policy import start
from training.output import Run
from training.policy import Decoding, default_config
from training.positions import Cache
from training.preference_losses import Loss
from training.preference_report import fit_scores, report_fit, report_positions
from training.preferences import Preferences, read_preferences, split, together
from training.prompts import Prompt, read_prompts
from training.proxy_ppo import decoding_settings
from training.publish import publish
from training.ranked_answers import SAMPLES, RankedAnswers
from training.reward_loading import reward_bytes
from training.rewards import Frozen
from training.rollout_backends import (
    BackendOptions,
    RolloutBackend,
    make_backend,
    refuse_incomplete_servers,
)
from training.run_card import write_card
from training.run_marker import settings_of
from training.run_options import RunOptions
from training.sizes import sizes_of

POSITIONS = "positions"
WRITES = (
    *(*METRICS_FILES, WEIGHTS_FILE, CONFIG_FILE, CARD_FILE),
    *(f"{POSITIONS}/*", f"{SAMPLES}/*.jsonl"),
)
READS = ("model", "preferences", "held_out", "prompts", "reward")
BETAS: dict[Loss, float] = {"dpo": 0.3, "ipo": 0.1, "simpo": 2.0, "kto": 0.3}
_ASIDE, _FEW = 500, 500  # preferences: maximum to set aside, and minimum to set any aside


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions, BackendOptions):
    """Options of training a proxy on preferences."""

    model: str
    """The frozen LLM: a directory or a hub id."""
    output: Path
    """Directory for the checkpoint, its metrics, and the state that `--resume` continues from."""
    preferences: str | None = None
    """JSON lines or Parquet of pairs or of single verdicts, or a data set's name."""
    held_out: str | None = None
    """Preferences for choosing the best pass and for evaluation. None = a tenth of all, at most 500, if there are 500
    or more: fewer would choose by chance.
    """
    max_rows: PositiveInt | None = None
    """Use only the first preferences, or prompts, up to this number."""
    prompts: str | None = None
    """Prompts that the LLM answers, instead of preferences."""
    reward: str | None = None
    """The reward that ranks its answers, as `training.proxy_ppo` takes it."""
    fluency_weight: NonNegative = 0.0
    """Adds to the reward this times the mean log-probability of an answer's tokens under the frozen LLM, in nats."""
    coherence_weight: NonNegative = 0.0
    """Adds to the reward a probe of coherence, as in `training.proxy_ppo`."""
    samples: Annotated[int, Field(ge=2)] = 6
    """Answers to each prompt, in each round."""
    rounds: PositiveInt = 1
    """Rounds of sampling; from the second on, the proxy of the previous round answers."""
    loss: Literal["auto"] | Loss = "auto"
    """auto = dpo for pairs, kto for single verdicts."""
    beta: Positive | None = None
    """β: a higher one stays nearer to the frozen LLM. None = 0.3; 0.1 for ipo, 2 for simpo."""
    kl_weight: NonNegative = Settings.kl_weight
    """Weight of KL(proxied ‖ frozen) in nats a response."""
    caution_weight: NonNegative = Settings.caution_weight
    """Weight of (log a)² of the best candidate at each position: a penalty for rejecting every candidate."""
    learning_rate: Positive = Settings.learning_rate
    """AdamW's learning rate, decreasing linearly to 0."""
    max_grad_norm: Positive = Settings.max_grad_norm
    """Gradients are clipped to this norm."""
    epochs: PositiveInt | None = None
    """Passes over the preferences; the one with the lowest scaled loss of held-out ones is kept (`docs/metrics.md`)."""
    batch_size: PositiveInt | None = None
    """Preferences in a gradient step."""
    weight_decay: NonNegative | None = None
    """AdamW's weight decay."""
    width: Annotated[int, Field(ge=2)] | None = None
    """Width of the proxy's layers."""
    max_candidates: PositiveInt = 16
    """K: maximum number of candidates at a position."""
    max_rejections: NonNegativeInt | None = None
    """Maximum number of rejections at a position. None = all candidates may be rejected. Lower values make training
    slower.
    """
    use_logprob: bool = True
    """Whether the candidate's log-probability is an input of the proxy."""
    decoding: Decoding = field(default_factory=Decoding)
    """The nucleus that the proxy chooses from, and how answers are sampled."""
    max_length: PositiveInt = 1024
    """Preferences with a longer response, its prompt included, in tokens, are left out and counted."""
    max_prompt_tokens: PositiveInt = 1024
    """Longer prompts are left out and counted."""
    responses_at_once: PositiveInt = 64
    """Maximum number of answers sampled and scored at once."""
    cache: Path | None = None
    """Directory for hidden states, which other runs may share. None = `positions` in the output directory."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen LLM."""
    resume: bool = False
    """Continue with the samples and hidden states in the output directory."""
    overwrite: bool = False
    """Replace the files of an earlier run of this command in the output directory; other files stay."""
    seed: Seed = 0
    """Seed of weights, order, samples, and of what is set aside."""


class ProxyDPOTrainer:
    """Samples, reads and fits, with a frozen LLM."""

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
            assert options.reward is not None, "refused at the start"
            sizes = sizes_of(directory)
            self.batch_size = responses_at_once(
                sizes,
                options.responses_at_once,
                max(len(prompt.ids) for prompt in self.prompts),
                options.decoding.max_new_tokens,
                dtype.itemsize,
                reward_bytes(options.reward, dtype) + options.backend_bytes(sizes.parameters),
            )
        self.model = load_model(directory, dtype=dtype)[0]
        self.model.to(accelerator.device).eval().requires_grad_(False)
        self.end_ids = end_ids(self.model, self.tokenizer)
        self.config = default_config(
            self.model,
            **decoding_settings(options.decoding),
            width=options.width or 64,
            max_candidates=options.max_candidates,
            max_rejections=(
                options.max_candidates if options.max_rejections is None else options.max_rejections
            ),
            use_logprob=options.use_logprob,
        )
        self.embeddings = self.model.get_input_embeddings().weight.detach()

        kept_in = options.cache or options.output / POSITIONS
        self.cache = Cache(kept_in, self.base, options.dtype, accelerator)

    def train(self, run: Run) -> None:
        """Read or sample the preferences, fit a proxy to them, and save it.

        Raises:
            TrainingError: there is nothing to learn from.
        """
        if self.prompts:
            network, last = self._from_answers(run)
        else:
            network, last = self._from_preferences(run)
        if self.accelerator.is_main_process:
            training = {"options": settings_of(self.options, ()), "last": last}
            version = save(self.options.output, network, base=self.base, training=training)
            print(f"{self.options.output}: version {version}")

    def _from_preferences(self, run: Run) -> tuple[ProxyNetwork, Row]:
        assert self.options.preferences is not None, "refused at the start"
        parts = self._parts(self._read(self.options.preferences, self.options.max_rows))
        tokens = (each.prompt + each.response for each in parts[0].responses)
        refuse_unknown(self.model, self.tokenizer, tokens)
        longest = max(each.length for each in parts[0].responses)
        backend = self._make_backend(longest, len(parts[0].responses))
        run.start()
        with closing(backend), self._metrics() as metrics:
            return self._fit(*parts, backend, metrics, run)

    def _from_answers(self, run: Run) -> tuple[ProxyNetwork, Row]:
        options = self.options
        refuse_unknown(self.model, self.tokenizer, (prompt.ids for prompt in self.prompts))
        frozen = Frozen(
            self.model,
            self.tokenizer,
            self.base,
            options.decoding,
            self.end_ids,
            self.batch_size,
        )
        longest = max(len(prompt.ids) for prompt in self.prompts)
        backend = self._make_backend(longest, len(self.prompts) * options.samples)
        answers = RankedAnswers(options, self.prompts, frozen, backend, self.accelerator)
        run.start()
        network, row = None, Row()
        with closing(backend), self._metrics() as metrics:
            for number in range(options.rounds):
                answers.sample(number, network)
                run.saved = f"round {number + 1} of {options.rounds}"
                parts = self._parts(answers.preferences())
                network, row = self._fit(*parts, backend, metrics, run)
        assert network is not None, "there is a round"
        return network, row

    def _parts(self, whole: Preferences) -> tuple[Preferences, Preferences]:
        """The training part and the held-out part."""
        options = self.options
        if options.held_out is not None:
            return together(whole, self._read(options.held_out))
        count = 0 if len(whole) < _FEW else min(_ASIDE, len(whole) // 10)
        return split(whole, count, options.seed)

    def _read(self, source: str, limit: int | None = None) -> Preferences:
        options, longest = self.options, min(self.options.max_length, context_of(self.model))
        chats = Conversations(self.tokenizer)
        return read_preferences(source, chats, self.end_ids, longest, options, limit)

    def _make_backend(self, longest: int, responses: int) -> RolloutBackend:
        """For prompts, or whole responses, of up to `longest` tokens."""
        return make_backend(
            self.options,
            self.model,
            self.base,
            self.accelerator,
            longest=longest + 1,  # vLLM needs room for one token after a response that is read
            responses=responses,
            batch_size=self.batch_size,
        )

    def _metrics(self) -> Any:
        is_main = self.accelerator.is_main_process
        return Metrics(self.options) if is_main else nullcontext()

    def _fit(
        self,
        train: Preferences,
        held_out: Preferences,
        backend: RolloutBackend,
        metrics: Metrics | None,
        run: Run,
    ) -> tuple[ProxyNetwork, Row]:
        """The best proxy and its metrics."""
        options = self.options
        positions = self.cache.read(train.responses, self.config, backend.read)
        report_positions(positions)
        sized = sized_for(len(train))
        width = options.width or sized.width
        loss = loss_of(options, train, held_out)
        settings = Settings(
            loss=loss,
            beta=options.beta or BETAS[loss],
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
        print_once(
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
            report_fit(fit.best_row, len(held_out))
            run.scores = [*fit_scores(fit.best_row, len(held_out))]
        return fit.best, fit.best_row


def loss_of(options: Options, *parts: Preferences) -> Loss:
    """
    Raises:
        TrainingError: the loss is one of pairs, and there are verdicts.
    """
    has_verdicts = any(part.verdicts for part in parts)
    if options.loss == "auto":
        return "kto" if has_verdicts else "dpo"
    if has_verdicts and options.loss != "kto":
        raise TrainingError(
            f"--loss {options.loss} needs pairs, and there are single verdicts: use kto"
        )
    return options.loss


def refuse_mixed(options: Options) -> None:
    """
    Raises:
        TrainingError: neither preferences nor prompts with a reward are given, or both.
    """
    refuse_incomplete_servers(options)
    if (options.preferences is None) == (options.prompts is None):
        raise TrainingError("give --preferences, or --prompts and --reward: exactly one of the two")
    if (options.prompts is None) != (options.reward is None):
        raise TrainingError("--prompts and --reward go together: the reward ranks the answers")
    for name in ("fluency_weight", "coherence_weight"):
        if getattr(options, name) and options.prompts is None:
            flag = name.replace("_", "-")
            raise TrainingError(f"--{flag} is for --prompts: preferences have no reward")


def main(options: Options) -> None:
    with output.run(options, "training.proxy_dpo", reads=READS, writes=WRITES) as run:
        if not run.is_finished:
            ProxyDPOTrainer(options, start()).train(run)
            write_card(run, options)
    publish(run, options)


if __name__ == "__main__":
    with main_guard():
        main(read_options(Options, __doc__))
