// The view "Best of N": samples, and the tournament in which the judge ranks them.

import { events, send } from "./api.js";
import { Bracket } from "./bracket.js";
import { announce, button, byId, el, fill } from "./dom.js";
import { numberField, selectField, temperatureSlider } from "./controls.js";
import { errorBox, isStop } from "./errors.js";
import { defaultJudge, examples, session } from "./session.js";
import { openSnippets } from "./snippets.js";

const PATH = "v1/chat/completions";
const ITSELF = "The LLM itself";
const STRATEGIES = [["knock-out", "Knock-out"], ["final-four", "Final four"], ["round-robin", "Round-robin"], ["adaptive", "Adaptive"]];

class Tournament {
  #controller = null;

  constructor() {
    this.number = selectField({ label: "Samples", options: [2, 4, 8, 16].map((n) => [n, String(n)]) });
    this.number.select.value = "8";
    this.strategy = selectField({ label: "Strategy", options: STRATEGIES });
    this.proxy = selectField({ label: "Drawn from", options: [["", "Frozen LLM"]] });
    this.judge = selectField({ label: "Judge", options: [["{}", ITSELF]] });
    this.temperature = temperatureSlider({ min: 0.1 });
    this.seed = numberField({ label: "Seed", min: 0, max: 2 ** 31, value: 1 });
    this.maxTokens = numberField({ label: "New tokens", min: 1, max: 4096, value: 60 });
    const fields = [this.number, this.strategy, this.proxy, this.judge, this.temperature, this.seed, this.maxTokens];
    byId("tournament-settings").append(...fields.map((field) => field.element));
    byId("tournament-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("tournament-copy").addEventListener("click", () => openSnippets(PATH, this.request));
    byId("tournament-stop").addEventListener("click", () => this.#controller?.abort());
    session.addEventListener("change", () => this.#refresh());
  }

  #refresh() {
    const isFirst = !byId("tournament-examples").children.length;
    const names = session.names.map((name) => [name, `Proxy ${name}`]);
    byId("tournament-form").querySelector("[type=submit]").disabled = !session.model;
    fill(this.proxy.select, [["", "Frozen LLM"], ...names]);
    const byProxy = session.names.map((proxy) => [JSON.stringify({ kind: "proxy", proxy }), `Proxy ${proxy}`]);
    const added = session.judges.map((kind) => [JSON.stringify({ kind }), `Judge: ${kind}`]);
    fill(this.judge.select, [["{}", ITSELF], ...added, ...byProxy]);
    if (isFirst) this.judge.select.value = JSON.stringify(defaultJudge());
    const choose = (text) => () => (byId("tournament-prompt").value = text);
    const buttons = examples().map((text) => button(text, choose(text), { class: "example" }));
    byId("tournament-examples").replaceChildren(...buttons);
  }

  get request() {
    const judge = { strategy: this.strategy.select.value, ...JSON.parse(this.judge.select.value) };
    const alignment = { best_of: Number(this.number.select.value), judge };
    if (this.proxy.select.value) alignment.proxy = this.proxy.select.value;
    return {
      model: session.model,
      messages: [{ role: "user", content: byId("tournament-prompt").value.trim() }],
      seed: this.seed.get(),
      max_tokens: this.maxTokens.get(),
      ...this.temperature.fields,
      stream: true,
      alignment,
    };
  }

  async run() {
    this.#controller?.abort();
    const controller = (this.#controller = new AbortController());
    const { request } = this;
    const bracket = new Bracket(request.messages, request.alignment.best_of, request.alignment.judge);
    const end = el("div", {});
    byId("tournament").replaceChildren(end, bracket.element);
    byId("tournament-stop").hidden = false;
    try {
      const response = await send({ method: "POST", path: PATH, body: request }, controller.signal);
      for await (const event of events(response)) {
        const { progress, judge } = event.alignment ?? {};
        if (progress?.stage === "sampling") bracket.addSample(progress);
        if (progress?.stage === "judging") bracket.addRound(progress.comparisons);
        if (judge) bracket.end(judge, event.alignment);
      }
      announce("The tournament has ended.");
    } catch (error) {
      end.replaceChildren(isStop(error) ? el("p", { class: "muted" }, "Stopped.") : errorBox(error, () => this.run()));
    }
    if (controller === this.#controller) byId("tournament-stop").hidden = true;
  }
}

export function setUpTournament() {
  new Tournament();
}
