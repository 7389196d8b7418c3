// Alignment as it happens: every token with what the proxy rejected before it.

import { el, percent } from "./dom.js";

const MAX_SHOWN = 2; // rejected candidates above a token; the details have all
const LONGEST_WORD = 12; // tokens that a line keeps together: a URL must break somewhere
// After these a line may break; scripts without spaces break anywhere.
const BREAKS = /[-–—/\s\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}\p{Script=Lao}\p{Script=Khmer}\p{Script=Myanmar}]$/u;

/**
 * Finds each traced token in the streamed text. The end of the turn has an entry and no text; a character that
 * takes several tokens arrives with the last of them.
 */
export class Pairing {
  #text = "";
  #entries = [];

  /** More of both; returns [text, entry] of every token that is complete. entry: null = it was not traced. */
  push(text, entries) {
    this.#text += text;
    this.#entries.push(...entries);
    const pairs = [];
    while (this.#entries.length && this.#text) {
      const length = this.#firstLength();
      if (length === null) return pairs;
      pairs.push(this.#take(length));
    }
    if (this.#text) pairs.push(this.#take(this.#text.length));
    return pairs;
  }

  /** What is left when the answer has ended: text, and the entry of the end of the turn. */
  finish() {
    const pairs = this.#text ? [this.#take(this.#text.length)] : [];
    const end = this.#entries.at(-1);
    return end ? [...pairs, ["", end]] : pairs;
  }

  #take(length) {
    const text = this.#text.slice(0, length);
    this.#text = this.#text.slice(length);
    return [text, this.#entries.shift() ?? null];
  }

  /** Characters of the first entry; null = not known before more has come. */
  #firstLength() {
    const [first, ...others] = this.#entries;
    const spaces = this.#text.length - this.#text.trimStart().length;
    for (const start of [0, spaces]) {
      if (this.#text.startsWith(first.token, start)) return start + first.token.length;
    }
    if (first.token.startsWith(this.#text)) return null;
    const next = others.find((entry) => entry.token && this.#text.includes(entry.token));
    if (next === undefined) return null;
    return others[0] === next ? this.#text.indexOf(next.token) : 0;
  }
}

/** An answer whose tokens can be looked at: by pointer, by touch, or with the arrow keys. */
export class TraceView {
  /** The tokens of the last word; null = the next token begins one. A line would break before and after a ruby. */
  #word = null;

  constructor() {
    this.element = el("div", {
      class: "text",
      role: "group",
      "aria-label": "Answer. The arrow keys move from token to token.",
    });
    this.pairing = new Pairing();
    this.element.addEventListener("keydown", (event) => this.#move(event));
  }

  push(text, entries) {
    this.#append(this.pairing.push(text, entries));
  }

  finish() {
    this.#append(this.pairing.finish());
    const first = this.element.querySelector(".token");
    if (first) first.tabIndex = 0;
  }

  #append(pairs) {
    for (const [text, entry] of pairs) {
      for (const node of entry === null ? [text] : traced(text, entry)) {
        if (typeof node === "string") this.#appendText(node);
        else this.#appendToken(node);
      }
      if (BREAKS.test(text) || this.#word?.children.length === LONGEST_WORD) this.#word = null;
    }
  }

  #appendText(text) {
    this.element.append(text);
    this.#word = null;
  }

  #appendToken(token) {
    if (this.#word === null) this.element.append((this.#word = el("span", { class: "word" })));
    this.#word.append(token);
  }

  #move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tokens = [...this.element.querySelectorAll(".token")];
    const next = tokens[tokens.indexOf(document.activeElement) + step];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
}

/** Nodes of a token: white space stays outside of what is coloured. */
function traced(text, entry) {
  const [, before, word, after] = text.match(/^(\s*)([^]*?)(\s*)$/);
  const shown = word || (entry.rejected.length ? (text ? "␣" : "end") : "");
  if (!shown) return [text];
  const token = el("span", { class: `token ${levelOf(entry)}${text ? "" : " end"}`, tabindex: -1 });
  if (entry.rejected.length) token.append(el("ruby", {}, shown, rejectedAbove(entry.rejected)));
  else token.append(shown);
  const show = () => showDetails(token, entry);
  token.addEventListener("pointerenter", show);
  token.addEventListener("focus", show);
  token.addEventListener("pointerleave", hideDetails);
  token.addEventListener("blur", hideDetails);
  return [before, token, after].filter((node) => node !== "");
}

function rejectedAbove(rejected) {
  const shown = rejected.slice(0, MAX_SHOWN).map(({ token }) => el("s", {}, token.trim() || visible(token)));
  const more = rejected.length - shown.length;
  return el("rt", { "aria-hidden": "true" }, ...shown.flatMap((s, i) => (i ? [" ", s] : [s])), more ? ` +${more}` : null);
}

/** The class of its colour: by accept probability in fifths. */
function levelOf({ accept_probability: accept, forced }) {
  if (forced) return "forced";
  return accept === null ? "" : `accept-${Math.min(4, Math.floor(accept * 5))}`;
}

const visible = (token) => token.replaceAll("\n", "⏎").replaceAll(" ", "␣") || "∅";

const details = el("div", { id: "token-details", role: "tooltip", hidden: true });
document.body.append(details);
document.addEventListener("keydown", (event) => event.key === "Escape" && hideDetails());
document.addEventListener("scroll", () => hideDetails(), true);

function showDetails(token, entry) {
  const outcome = entry.forced ? "forced" : entry.accept_probability === null ? "the only candidate" : "accepted";
  const rows = [...entry.rejected.map((candidate) => [candidate, "rejected"]), [entry, outcome]];
  const cells = rows.map(([candidate, outcome]) =>
    el(
      "tr",
      { class: outcome === "rejected" ? "rejected" : null },
      el("th", { scope: "row" }, visible(candidate.token)),
      el("td", {}, percent(candidate.probability)),
      el("td", {}, candidate.accept_probability === null ? "–" : percent(candidate.accept_probability)),
      el("td", {}, outcome),
    ),
  );
  const head = ["candidate", "LLM", "accept", ""].map((text) => el(text ? "th" : "td", {}, text));
  details.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...cells)));
  details.hidden = false;
  token.setAttribute("aria-describedby", details.id);
  const { left, top, bottom } = token.getBoundingClientRect();
  const { width, height } = details.getBoundingClientRect();
  const below = bottom + 8 + height < innerHeight;
  details.style.left = `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`;
  details.style.top = `${Math.max(8, below ? bottom + 8 : top - height - 8)}px`;
}

function hideDetails() {
  details.hidden = true;
  document.querySelector("[aria-describedby=token-details]")?.removeAttribute("aria-describedby");
}
