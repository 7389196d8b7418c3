// How much feedback the server keeps of this person, and how to train on it.

import { button, byId, el } from "./dom.js";
import { countFeedback, session } from "./session.js";
import { copy } from "./snippets.js";

function draw() {
  const { enabled, person, judge, database } = session.feedback;
  const choices = `${person} ${person === 1 ? "choice" : "choices"} of yours`;
  const verdicts = `${judge} ${judge === 1 ? "verdict" : "verdicts"} of the judge on your requests`;
  byId("feedback-summary").textContent = enabled ? `Feedback: ${choices}, ${verdicts}` : "Feedback is not kept";
  if (!enabled) {
    const how = el("p", {}, "Start the server with ", el("code", {}, "--feedback feedback.db"), " to keep verdicts and to train on them.");
    byId("feedback-body").replaceChildren(how);
    return;
  }
  const code = el("pre", { tabindex: 0, "aria-label": "Commands" }, commands(database ?? "feedback.db", session.modelPath));
  byId("feedback-body").replaceChildren(
    el("p", {}, "A proxy that prefers what you prefer, trained on what is kept:"),
    code,
    button("Copy", () => copy(code)),
  );
}

const commands = (database, model) => `python -m training.export --feedback ${database} --output preferences.jsonl
python -m training.proxy_dpo --model ${model} --preferences preferences.jsonl --output runs/mine
python -m server --model ${model} --proxy mine=runs/mine`;

export function setUpFeedback() {
  session.addEventListener("change", draw);
  byId("feedback").addEventListener("toggle", () => {
    if (byId("feedback").open && session.model) countFeedback().catch(() => {}); // the header says what is wrong
  });
}
