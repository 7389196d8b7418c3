// Errors, where they happen, in words that say what to do.

import { byId, button, el } from "./dom.js";

const HINTS = [
  [/context length|maximum context|max_model_len/i, "Begin a new conversation, or ask for fewer new tokens."],
  [/is not loaded/, "It was unloaded meanwhile: choose another one."],
  [/trace is not open to this key/, "Switch “Show the trace” off."],
];

/** A box with an error, and a button to try again where `retry` is given. */
export function errorBox(error, retry) {
  const waits = error.status === 429 && error.retryAfter ? `Try again in ${error.retryAfter} s.` : null;
  const hint = HINTS.find(([pattern]) => pattern.test(error.message))?.[1] ?? waits;
  return el(
    "div",
    { class: "error", role: "alert" },
    el("p", {}, error.message),
    hint && el("p", { class: "hint" }, hint),
    el(
      "div",
      { class: "row" },
      error.status === 401 ? button("Enter an API key", openKeyDialog) : null,
      retry ? button("Try again", retry) : null,
    ),
  );
}

export function openKeyDialog() {
  const dialog = byId("key-dialog");
  if (!dialog.open) dialog.showModal();
}

/** Whether a person has stopped it: no error to show. */
export const isStop = (error) => error.name === "AbortError";
