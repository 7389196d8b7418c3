// One answer: its stream, its text, what the proxy did, and how fast it came.

import { events, send } from "./api.js";
import { button, el, replace } from "./dom.js";
import { errorBox, isStop } from "./errors.js";
import { loadSession } from "./session.js";
import { openSnippets } from "./snippets.js";
import { TraceView } from "./trace.js";

export class Answer {
  #controller = null;

  /** label: a letter. build: makes the body of its request. onEnd: called when it has ended, however. */
  constructor(label, build, onEnd) {
    Object.assign(this, { label, build, onEnd, text: "", isComplete: false });
    this.title = el("h3");
    this.body = el("div");
    this.counts = el("p", { class: "counts" });
    this.copy = button("Copy request", () => openSnippets("v1/chat/completions", this.request), { class: "quiet" });
    this.actions = el("div", { class: "row" }, this.copy);
    const foot = el("footer", {}, this.counts, this.actions);
    this.element = el("article", { class: "answer" }, el("header", {}, this.title), this.body, foot);
  }

  get isRunning() {
    return this.#controller !== null;
  }

  stop() {
    this.#controller?.abort();
  }

  /** Ask, or ask again. */
  async run() {
    this.stop();
    const controller = (this.#controller = new AbortController());
    this.request = this.build();
    this.text = "";
    this.isComplete = false;
    const view = new TraceView();
    this.#show(view);
    const error = await this.#read(view, controller.signal).catch((reason) => reason);
    view.finish();
    if (controller !== this.#controller) return; // it has been asked again meanwhile
    this.isComplete = !error;
    if (error) this.#showError(error);
    this.#controller = null;
    this.element.removeAttribute("aria-busy");
    this.onEnd();
  }

  async #read(view, signal) {
    const start = performance.now();
    const response = await send({ method: "POST", path: "v1/chat/completions", body: this.request }, signal);
    let [usage, alignment] = [null, null];
    for await (const event of events(response)) {
      signal.throwIfAborted();
      const text = event.choices[0]?.delta.content ?? "";
      const entries = (event.alignment?.trace ?? []).flatMap((part) => part.entries);
      this.text += text;
      view.push(text, entries);
      usage = event.usage ?? usage;
      if (event.alignment && "proposed" in event.alignment) alignment = event.alignment;
    }
    signal.throwIfAborted();
    this.#summarize(usage, alignment, (performance.now() - start) / 1000);
  }

  #show(view) {
    const { proxy, strength } = this.request.alignment ?? {};
    const name = proxy ? `${proxy}` : "Frozen LLM";
    const detail = proxy ? el("span", { class: "muted" }, `strength ${strength}`) : null;
    replace(this.title, el("span", { class: "letter" }, this.label), name, detail);
    this.body.replaceChildren(view.element);
    this.counts.textContent = "";
    this.element.setAttribute("aria-busy", "true");
  }

  #showError(error) {
    if (isStop(error)) this.counts.textContent = "Stopped.";
    else this.body.append(errorBox(error, () => this.run()));
    if (error.status === 404) loadSession().catch(() => {}); // the proxy was unloaded: show what there is
  }

  #summarize(usage, alignment, seconds) {
    const tokens = usage.completion_tokens;
    const facts = [[tokens, tokens === 1 ? "token" : "tokens"], [(tokens / seconds).toFixed(1), "tokens/s"]];
    if (alignment?.proxy) {
      for (const name of ["proposed", "accepted", "rejected", "forced"]) facts.push([alignment[name], name]);
      this.title.title = `version ${alignment.version}`;
    }
    const parts = facts.map(([number, name]) => el("span", {}, el("b", {}, String(number)), ` ${name}`));
    this.counts.replaceChildren(...parts);
  }
}
