// The view "Side by side": a conversation that several columns answer at once.

import { Answer } from "./answer.js";
import { announce, button, byId, el } from "./dom.js";
import { Setup } from "./columns.js";
import { judgePanel } from "./judge.js";
import { defaultJudge, examples, session } from "./session.js";
import { verdictBar } from "./verdict.js";

/** One message, and the answers to it. The next turn continues one of them. */
class Turn {
  constructor(prompt, before, conversation) {
    Object.assign(this, { prompt, before, conversation, answers: new Map(), goesOnWith: null });
    this.grid = el("div", { class: "answers" });
    this.after = el("div", { class: "after" });
    this.element = el("section", { class: "turn" }, el("p", { class: "prompt" }, prompt), this.grid, this.after);
  }

  /** The conversation up to this turn's message. */
  get messages() {
    return [...(this.before?.messagesWithAnswer ?? []), { role: "user", content: this.prompt }];
  }

  get messagesWithAnswer() {
    const answer = this.answers.get(this.goesOnWith) ?? this.complete.at(-1);
    return [...this.messages, { role: "assistant", content: answer?.text ?? "" }];
  }

  get complete() {
    return [...this.answers.values()].filter((answer) => answer.isComplete && answer.text);
  }

  get isRunning() {
    return [...this.answers.values()].some((answer) => answer.isRunning);
  }

  /** Have these columns answer, or answer again. */
  ask(columns) {
    this.after.replaceChildren();
    for (const column of columns) {
      if (!this.answers.has(column)) {
        const build = () => this.conversation.setup.request(column, this.messages);
        this.answers.set(column, new Answer(column.letter, build, () => this.#ended()));
      }
      this.answers.get(column).run();
    }
    this.grid.replaceChildren(...[...this.answers.values()].map((answer) => answer.element));
    this.conversation.update();
  }

  keepOnly(columns) {
    for (const column of this.answers.keys()) {
      if (columns.includes(column)) continue;
      this.answers.get(column).stop();
      this.answers.delete(column);
    }
  }

  stop() {
    for (const answer of this.answers.values()) answer.stop();
  }

  #ended() {
    this.conversation.update();
    if (this.isRunning) return;
    announce("All have answered.");
    const { complete, messages } = this;
    if (complete.length < 2) return;
    const answers = complete.map(({ label, text }) => ({ label, text }));
    const panels = el("div", { class: "pairs" });
    const judge = button("Ask the judge", () => {
      const pairs = answers.flatMap((a, i) => answers.slice(i + 1).map((b) => [a, b]));
      panels.replaceChildren(...pairs.map(([a, b]) => judgePanel(messages, a, b, defaultJudge())));
    });
    const columns = [...this.answers.keys()].filter((column) => complete.includes(this.answers.get(column)));
    const verdict = verdictBar(() => messages, answers, (index) => this.#goOnWith(columns[index]));
    this.after.replaceChildren(verdict, judge, panels);
  }

  #goOnWith(chosen) {
    this.goesOnWith = chosen;
    for (const [column, answer] of this.answers) answer.element.classList.toggle("chosen", column === chosen);
  }
}

class Conversation {
  constructor() {
    this.turns = [];
    this.setup = new Setup((columns) => this.#askAgain(columns));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send(byId("prompt").value.trim());
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      byId("composer").requestSubmit();
    });
    if (matchMedia("(max-width: 900px)").matches) byId("setup").open = false;
    byId("stop").addEventListener("click", () => this.turns.at(-1)?.stop());
    byId("restart").addEventListener("click", () => this.#restart());
    session.addEventListener("change", () => this.update());
  }

  get isRunning() {
    return this.turns.at(-1)?.isRunning ?? false;
  }

  update() {
    byId("stop").hidden = !this.isRunning;
    byId("composer").querySelector("[type=submit]").disabled = this.isRunning || !session.model;
    byId("restart").hidden = !this.turns.length;
    byId("examples").replaceChildren(
      ...(this.turns.length ? [] : examples().map((text) => button(text, () => this.#send(text), { class: "example" }))),
    );
  }

  #send(prompt) {
    if (!prompt || this.isRunning || !session.model) return;
    const turn = new Turn(prompt, this.turns.at(-1) ?? null, this);
    this.turns.push(turn);
    byId("turns").append(turn.element);
    byId("prompt").value = "";
    turn.ask(this.setup.columns);
    turn.element.scrollIntoView({ block: "start", behavior: "smooth" });
  }

  #askAgain(columns) {
    const turn = this.turns.at(-1);
    turn?.keepOnly(this.setup.columns);
    turn?.ask(columns);
  }

  #restart() {
    this.turns.at(-1)?.stop();
    this.turns = [];
    byId("turns").replaceChildren();
    this.update();
    byId("prompt").focus();
  }
}

export function setUpCompare() {
  new Conversation();
  const levels = [0, 1, 2, 3, 4].map((level) => el("span", { class: `token accept-${level}` }, `${level * 20}–${level * 20 + 20} %`));
  byId("legend").append(
    el("p", {}, "A token’s colour is how probably the proxy accepts it; above it is what it ", el("s", {}, "rejected"), "."),
    ...levels,
    el("span", { class: "token forced" }, "forced"),
  );
}
