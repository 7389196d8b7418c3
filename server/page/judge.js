// What the judge says of two answers, and why.

import { events, json, send } from "./api.js";
import { button, el, percent, replace } from "./dom.js";
import { errorBox, isStop } from "./errors.js";
import { openSnippets } from "./snippets.js";

const PATH = "judge";

/**
 * A comparison of two answers to a conversation.
 *
 * a, b: { label, text }. judge: what names it in a request. result: as POST /judge returns it; without one the judge
 * is asked.
 */
export function judgePanel(messages, a, b, judge, result = null) {
  const body = { messages, response_a: a.text, response_b: b.text, ...judge };
  const panel = el("section", { class: "pair", "aria-label": `The judge on ${a.label} and ${b.label}` });
  if (result) showResult(panel, a, b, result, body);
  else ask(panel, a, b, body);
  return panel;
}

async function ask(panel, a, b, body) {
  panel.replaceChildren(el("p", { class: "muted" }, `The judge reads ${a.label} and ${b.label} …`));
  try {
    showResult(panel, a, b, await json("POST", PATH, body), body);
  } catch (error) {
    panel.replaceChildren(errorBox(error, () => ask(panel, a, b, body)));
  }
}

function showResult(panel, a, b, result, body) {
  const { winner, probability, orders, consistent } = result;
  const text = {
    a: `The judge prefers ${a.label} to ${b.label}`,
    b: `The judge prefers ${b.label} to ${a.label}`,
    tie: `The judge does not decide between ${a.label} and ${b.label}`,
  }[winner];
  const rationale = el("p", { class: "rationale", hidden: true });
  const why = button("Why?", () => explain(rationale, why, body));
  why.hidden = Boolean(body.kind); // only the LLM itself gives reasons
  const request = () => openSnippets(PATH, { ...body, rationale: !rationale.hidden });
  replace(
    panel,
    el("h4", {}, text, consistent ? null : el("span", { class: "badge warn" }, "flips")),
    consistent ? null : el("p", { class: "muted" }, "Which answer it prefers depends on the order in which it reads them."),
    el(
      "div",
      { class: "bars" },
      bar(`${a.label} read first`, orders[0], a, b),
      bar(`${b.label} read first`, orders[1], a, b),
      bar("mean", probability, a, b),
    ),
    rationale,
    el("div", { class: "row" }, why, button("Copy request", request, { class: "quiet" })),
  );
}

/** The probability that a is better than b. */
function bar(title, probability, a, b) {
  const fill = el("span", { class: "fill" });
  fill.style.width = percent(probability).replace(" ", "");
  const label = `${title}: ${a.label} is better with ${percent(probability)}`;
  return el(
    "div",
    { class: "bar", role: "img", "aria-label": label },
    el("span", { class: "bar-title" }, title),
    el("span", { class: probability > 0.5 ? "ahead" : "" }, `${a.label} ${percent(probability)}`),
    el("span", { class: "bar-track" }, fill),
    el("span", { class: probability < 0.5 ? "ahead" : "" }, `${percent(1 - probability)} ${b.label}`),
  );
}

async function explain(rationale, why, body) {
  rationale.hidden = false;
  why.disabled = true;
  rationale.replaceChildren("…");
  let text = "";
  try {
    const request = { method: "POST", path: PATH, body: { ...body, rationale: true, stream: true } };
    for await (const event of events(await send(request))) {
      if (event.object !== "judge.rationale") continue;
      text += event.delta;
      rationale.textContent = text;
    }
    if (!text.trim()) rationale.textContent = "The judge gives no reason.";
  } catch (error) {
    if (!isStop(error)) rationale.replaceChildren(errorBox(error));
  }
  why.disabled = false;
}

/** A comparison of a tournament's record as POST /judge would return it. */
export function resultOf({ orders, probability }) {
  const all = Object.values(orders);
  const mean = [0, 1].map((i) => all.reduce((sum, pair) => sum + pair[i], 0) / all.length);
  const consistent = (mean[0] - 0.5) * (mean[1] - 0.5) > 0;
  const winner = !consistent ? "tie" : probability > 0.5 ? "a" : "b";
  return { orders: mean, probability, consistent, winner };
}
