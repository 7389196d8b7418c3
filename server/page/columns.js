// Who answers: the frozen LLM or a proxy in each column, and the settings that all columns share.

import { button, byId, el, fill, replace } from "./dom.js";
import { numberField, slider, temperatureSlider } from "./controls.js";
import { session } from "./session.js";

const LETTERS = ["A", "B", "C"];
const FROZEN = "";

class Column {
  constructor(letter, proxy, { onchange, onremove }) {
    this.letter = letter;
    const changed = () => {
      this.#update();
      onchange(this);
    };
    this.select = el("select", { "aria-label": `Column ${letter}`, onchange: changed });
    this.strength = slider({
      label: "Strength",
      ...{ min: 0, max: 4, step: 0.25, value: 1 },
      format: (value) => (value === 0 ? "0, as the frozen LLM" : String(value)),
      onchange: changed,
    });
    const remove = onremove && button("Remove", () => onremove(this), { class: "quiet" });
    const head = el("div", { class: "row" }, el("span", { class: "letter" }, letter), this.select, remove);
    this.frozen = el("p", { class: "muted" }, "No proxy takes part.");
    this.element = el("div", { class: "column" }, head, this.strength.element, this.frozen);
    this.refresh();
    this.select.value = proxy;
    this.#update();
  }

  /** null = the frozen LLM. */
  get proxy() {
    return this.select.value || null;
  }

  refresh() {
    const options = [[FROZEN, "Frozen LLM"], ...session.names.map((name) => [name, `Proxy ${name}`])];
    if (this.proxy && !session.names.includes(this.proxy)) options.push([this.proxy, `Proxy ${this.proxy} (not loaded)`]);
    fill(this.select, options);
    this.#update();
  }

  #update() {
    this.strength.element.hidden = this.proxy === null;
    this.frozen.hidden = this.proxy !== null;
  }
}

/** The columns and settings of the view. onchange is called with the columns that must answer again. */
export class Setup {
  constructor(onchange) {
    this.columns = [];
    this.onchange = onchange;
    const all = () => onchange(this.columns);
    this.temperature = temperatureSlider({ min: 0, onchange: all });
    this.seed = numberField({ label: "Seed", min: 0, max: 2 ** 31, value: 1, onchange: all });
    this.maxTokens = numberField({ label: "New tokens", min: 1, max: 4096, value: 200, onchange: all });
    this.trace = el("input", { type: "checkbox", checked: true, onchange: all });
    const trace = el("label", { class: "check" }, this.trace, " Show the trace");
    const again = button("New seed", () => {
      this.seed.set(Math.floor(Math.random() * 10_000));
      all();
    });
    const { temperature, seed, maxTokens } = this;
    byId("settings").append(temperature.element, seed.element, again, maxTokens.element, trace);
    this.add = button("Add a column", () => this.#add(), { class: "quiet" });
    session.addEventListener("change", () => this.#refresh());
  }

  /** The body of a request for an answer to these messages. */
  request(column, messages) {
    const body = {
      model: session.model,
      messages,
      seed: this.seed.get(),
      max_tokens: this.maxTokens.get(),
      ...this.temperature.fields,
      stream: true,
      stream_options: { include_usage: true },
    };
    const { proxy, strength } = column;
    if (proxy) body.alignment = { proxy, strength: strength.value, trace: this.trace.checked };
    return body;
  }

  #refresh() {
    if (!this.columns.length) {
      for (const proxy of [FROZEN, ...session.names.slice(0, 1)]) this.columns.push(this.#column(proxy));
    }
    for (const column of this.columns) column.refresh();
    this.#draw();
  }

  #add() {
    const unused = session.names.find((name) => !this.columns.some((column) => column.proxy === name));
    const column = this.#column(unused ?? session.names[0] ?? FROZEN);
    this.columns.push(column);
    this.#draw();
    this.onchange([column]);
  }

  #remove(column) {
    this.columns = this.columns.filter((other) => other !== column);
    this.#draw();
    this.onchange([]);
  }

  #column(proxy) {
    const letter = LETTERS.find((name) => !this.columns.some((column) => column.letter === name));
    const onremove = this.columns.length < 2 ? null : (column) => this.#remove(column);
    return new Column(letter, proxy, { onchange: (column) => this.onchange([column]), onremove });
  }

  #draw() {
    const none = el(
      "p",
      { class: "muted" },
      "No proxy is loaded, so that only the frozen LLM answers. Load one with --proxy NAME=DIR, or under Proxies.",
    );
    const more = this.columns.length < LETTERS.length ? this.add : null;
    replace(byId("columns"), ...this.columns.map((column) => column.element), session.names.length ? null : none, more);
  }
}
