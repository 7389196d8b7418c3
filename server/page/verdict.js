// A person's own verdict, which the server keeps as feedback.

import { announce, button, el } from "./dom.js";
import { errorBox } from "./errors.js";
import { keepChoice, session } from "./session.js";

/**
 * Buttons to choose the better answer with.
 *
 * messages: () => the conversation. answers: of { label, text }. onChosen: called with the index.
 */
export function verdictBar(messages, answers, onChosen = () => {}) {
  const result = el("div", { class: "kept", role: "status" });
  const buttons = answers.map(({ label }, index) =>
    button(`${label} is better`, () => choose(index), { "aria-pressed": "false" }),
  );

  async function choose(index) {
    buttons.forEach((item, i) => item.setAttribute("aria-pressed", String(i === index)));
    onChosen(index);
    if (!session.feedback.enabled) {
      result.replaceChildren("This server keeps no feedback: start it with ", el("code", {}, "--feedback feedback.db"), ".");
      return;
    }
    const better = answers[index].text;
    const others = new Set(answers.map((answer) => answer.text));
    others.delete(better);
    try {
      for (const worse of others) await keepChoice(messages(), better, worse);
      const text = others.size ? "Kept." : "The answers are the same: neither is better.";
      result.replaceChildren(text);
      announce(text);
    } catch (error) {
      result.replaceChildren(errorBox(error, () => choose(index)));
    }
  }

  return el("div", { class: "verdict" }, el("div", { class: "row" }, el("span", { class: "muted" }, "Your verdict"), ...buttons), result);
}
