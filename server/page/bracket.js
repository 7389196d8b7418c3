// A tournament as it is played: the samples, the rounds, and the details of a match.

import { el, percent } from "./dom.js";
import { judgePanel, resultOf } from "./judge.js";
import { verdictBar } from "./verdict.js";

const ALL_PAIRS = "All pairs";

export class Bracket {
  /** judge: as the request names it. */
  constructor(messages, num, { strategy, ...judge }) {
    Object.assign(this, { messages, strategy, judge, texts: new Map(), rounds: 0 });
    this.samples = Array.from({ length: num }, (_, index) => sampleCard(index));
    this.standing = null; // indices among the samples that are judged, once these are known
    this.winner = el("div", { role: "status" });
    this.columns = el("div", { class: "rounds", role: "region", "aria-label": "Rounds", tabindex: 0 });
    this.columns.append(...expectedRounds(num, strategy).map(emptyRound));
    this.details = el("div", { class: "match-details" });
    this.element = el(
      "div",
      { class: "tournament" },
      this.winner,
      el("h2", {}, "Samples"),
      el("ol", { class: "samples" }, ...this.samples.map((sample) => sample.element)),
      el("h2", {}, "Tournament"),
      el("p", { class: "muted" }, "Choose a match to see both texts and the judge's probabilities."),
      this.columns,
      this.details,
    );
  }

  addSample({ index, text }) {
    this.texts.set(index, text);
    this.samples[index].set(text);
  }

  /** One more round: the comparisons' indices count the samples that did not drop out. */
  addRound(comparisons) {
    this.#fix();
    const adaptive = this.strategy === "adaptive";
    const allPairs = !adaptive && this.strategy !== "knock-out" && comparisons.length > this.standing.length / 2;
    const byes = adaptive ? [] : this.#byes(comparisons);
    const title = allPairs ? ALL_PAIRS : roundTitle(adaptive ? 0 : this.standing.length, this.rounds);
    const column = el("div", { class: "round" }, el("h3", {}, title));
    column.append(...comparisons.map((comparison) => this.#match(comparison)));
    column.append(...byes.map((index) => el("p", { class: "bye" }, `${this.#label(index)} · bye`)));
    const old = this.columns.children[this.rounds++];
    old ? old.replaceWith(column) : this.columns.append(column);
  }

  end({ ranking }, { dropped, drawn }) {
    this.#fix();
    while (this.columns.children.length > this.rounds) this.columns.lastChild.remove();
    const [best] = ranking;
    for (const { index, reason } of dropped) this.samples[index].drop(`dropped out: ${reason}`);
    this.samples.slice(drawn).forEach((sample) => sample.drop("not drawn: it was not expected to win"));
    ranking.forEach((index, place) => this.samples[this.judged[index]].rank(place));
    const title = el("h2", {}, `${this.#label(best)} wins`);
    this.winner.replaceChildren(el("div", { class: "winner" }, title, el("p", { class: "text" }, this.#text(best))));
  }

  #fix() {
    const all = this.strategy === "adaptive" ? this.samples : this.texts;
    this.judged ??= [...all.keys()].sort((a, b) => a - b);
    this.standing ??= this.judged.map((_, index) => index);
  }

  #byes(comparisons) {
    const playing = new Set(comparisons.flatMap(({ pair }) => pair));
    const byes = this.standing.filter((index) => !playing.has(index));
    const winners = comparisons.map(({ winner }) => winner);
    this.standing = [...new Set([...byes, ...winners])];
    return byes;
  }

  #label = (index) => `Sample ${this.judged[index] + 1}`;
  #text = (index) => this.texts.get(this.judged[index]);

  #match(comparison) {
    const { pair, probability, winner } = comparison;
    const result = resultOf(comparison);
    const row = (index, p) =>
      el(
        "span",
        { class: index === winner ? "side wins" : "side" },
        el("span", {}, this.#label(index), index === winner ? el("span", { class: "sr-only" }, " wins") : null),
        el("span", { class: "number" }, percent(p)),
      );
    const flips = result.consistent ? null : el("span", { class: "badge warn" }, "flips");
    const show = () => this.#show(comparison, result, match);
    const attributes = { type: "button", class: "match", onclick: show, "aria-pressed": "false" };
    const match = el("button", attributes, row(pair[0], probability), row(pair[1], 1 - probability), flips);
    return match;
  }

  #show({ pair }, result, match) {
    for (const other of this.columns.querySelectorAll(".match")) other.setAttribute("aria-pressed", String(other === match));
    const [a, b] = pair.map((index) => ({ label: this.#label(index), text: this.#text(index) }));
    const texts = [a, b].map(({ label, text }) =>
      el("article", { class: "answer" }, el("h3", {}, label), el("p", { class: "text" }, text)),
    );
    this.details.replaceChildren(
      el("div", { class: "answers" }, ...texts),
      judgePanel(this.messages, a, b, this.judge, result),
      verdictBar(() => this.messages, [a, b]),
    );
    this.details.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }
}

function sampleCard(index) {
  const text = el("p", { class: "sample-text" }, "…");
  const place = el("span", { class: "badge", hidden: true });
  const summary = el("summary", {}, el("b", {}, `Sample ${index + 1}`), place, text);
  const whole = el("p", { class: "text" });
  const element = el("li", { class: "sample" }, el("details", {}, summary, whole));
  return {
    element,
    set(content) {
      text.textContent = content.replaceAll("\n", " ");
      whole.textContent = content;
      element.classList.add("ready");
    },
    drop(reason) {
      text.textContent = reason;
    },
    rank(position) {
      place.textContent = position === 0 ? "winner" : `place ${position + 1}`;
      place.hidden = false;
      element.classList.toggle("best", position === 0);
    },
  };
}

/** Title and number of matches of each round, if no sample drops out. */
function expectedRounds(num, strategy) {
  if (strategy === "adaptive") return [];
  const rounds = [];
  let standing = num;
  const until = { "knock-out": 1, "final-four": 4, "round-robin": num }[strategy];
  while (standing > until) {
    const matches = Math.min(Math.floor(standing / 2), standing - until);
    standing -= matches;
    rounds.push([roundTitle(standing, rounds.length), matches]);
  }
  if (strategy !== "knock-out") rounds.push([ALL_PAIRS, (standing * (standing - 1)) / 2]);
  return rounds;
}

/** left: how many samples are unbeaten after it. */
function roundTitle(left, index) {
  return { 1: "Final", 2: "Semi-finals", 4: "Quarter-finals" }[left] ?? `Round ${index + 1}`;
}

function emptyRound([title, size]) {
  const side = () => el("span", { class: "side" }, "…");
  const matches = Array.from({ length: size }, () => el("div", { class: "match empty" }, side(), side()));
  return el("div", { class: "round" }, el("h3", {}, title), ...matches);
}
