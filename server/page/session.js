// What the page knows of the server: its LLM, its proxies, and the feedback that it keeps.

import { json } from "./api.js";

/** Tells of `change`. */
export const session = Object.assign(new EventTarget(), {
  /** Name of the frozen LLM; "" = not known yet. */
  model: "",
  /** Where it lies, for administrators; else its name. */
  modelPath: "",
  /** Proxies that a request may name. */
  names: [],
  /** As GET /proxies lists them. */
  proxies: [],
  /** Judges that were added with --judge, by kind; the first is used where nobody chooses. */
  judges: [],
  /** As GET /feedback counts it. */
  feedback: { enabled: false, person: 0, judge: 0 },
});

export async function loadSession() {
  const [models, proxies, judges, feedback] = await Promise.all([
    json("GET", "v1/models"),
    json("GET", "proxies"),
    json("GET", "judge"),
    json("GET", "feedback"),
  ]);
  const { id, root } = models.data[0];
  const aligned = models.data.filter((model) => model.id.startsWith(`${id}:`));
  Object.assign(session, { model: id, modelPath: root, proxies: proxies.data, feedback });
  session.judges = judges.data.map(({ kind }) => kind).filter((kind) => !["pairwise", "proxy"].includes(kind));
  session.names = aligned.map((model) => model.id.slice(id.length + 1));
  session.dispatchEvent(new Event("change"));
}

/** Keep a person's choice between two answers to a conversation. */
export async function keepChoice(messages, better, worse) {
  await json("POST", "feedback", { messages, response_a: better, response_b: worse, better: "a" });
  await countFeedback();
}

export async function countFeedback() {
  session.feedback = await json("GET", "feedback");
  session.dispatchEvent(new Event("change"));
}

/** What names the judge in a request. */
export const defaultJudge = () => (session.judges.length ? { kind: session.judges[0] } : {});

/** Prompts that suit the LLM: the toy demo's speaks of household things alone. */
export function examples() {
  return session.model === "assent-demo"
    ? ["Can I open my kettle with a fork?", "How do I look after my freezer?", "Can I spend 30 pounds on my laptop?", "Where do I keep my bicycle?"]
    : ["Why is the sky blue?", "How does a vaccine work?", "What is inflation?", "Explain to a child why we sleep."];
}
