// A request as a command or a program, to run elsewhere: the same answer, without the stream.

import { apiKey, baseUrl } from "./api.js";
import { announce, button, byId } from "./dom.js";

const CHAT = "v1/chat/completions";
const OPENAI = ["model", "messages", "seed", "max_tokens", "temperature", "n"]; // arguments of the client
const LANGUAGES = { curl: asCurl, Python: asPython, JavaScript: asJavaScript };

/** Show the request in a dialog. Keys are not copied: the code reads them from ASSENT_API_KEY. */
export function openSnippets(path, body, method = "POST") {
  const { stream, stream_options, ...rest } = body ?? {};
  const request = { method, path, body: body && rest };
  const buttons = Object.keys(LANGUAGES).map((name) =>
    button(name, () => choose(name), { "data-language": name }),
  );
  const choose = (name) => {
    byId("snippet").textContent = LANGUAGES[name](request);
    for (const item of buttons) item.setAttribute("aria-pressed", String(item.dataset.language === name));
  };
  byId("languages").replaceChildren(...buttons);
  choose("curl");
  byId("snippets").showModal();
}

export function setUpSnippets() {
  byId("copy-snippet").addEventListener("click", () => copy(byId("snippet")));
}

/** Copy what an element says. Without https a browser may not allow it: then it is selected. */
export async function copy(element) {
  try {
    await navigator.clipboard.writeText(element.textContent);
    announce("Copied.");
  } catch {
    getSelection().selectAllChildren(element);
    announce("Selected: copy it with Ctrl and C.");
  }
}

export function asCurl({ method, path, body }) {
  const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -s ${method === "POST" ? "" : `-X ${method} `}${quote(baseUrl + path)}`];
  if (apiKey.get()) lines.push('-H "Authorization: Bearer $ASSENT_API_KEY"');
  if (body) lines.push("-H 'Content-Type: application/json'", `-d ${quote(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

export function asPython({ method, path, body }) {
  const key = apiKey.get() ? 'os.environ["ASSENT_API_KEY"]' : '"none"';
  if (path === CHAT) {
    const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI.includes(name)));
    const given = Object.entries(body).filter(([name]) => OPENAI.includes(name));
    if (Object.keys(extra).length) given.push(["extra_body", extra]);
    const lines = given.map(([name, value]) => `    ${name}=${python(value, 1)},\n`);
    return `${apiKey.get() ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${baseUrl}v1", api_key=${key})
answer = client.chat.completions.create(
${lines.join("")})
print(answer.choices[0].message.content)
`;
  }
  const options = [`"${method}"`, `"${baseUrl}${path}"`, "timeout=None"];
  if (apiKey.get()) options.push(`headers={"Authorization": f"Bearer {${key.replaceAll('"', "'")}}"}`);
  if (body) options.push(`json=${python(body, 1)}`);
  return `${apiKey.get() ? "import os\n\n" : ""}import httpx

answer = httpx.request(
${options.map((option) => `    ${option},\n`).join("")})
print(answer.json())
`;
}

export function asJavaScript({ method, path, body }) {
  const headers = [];
  if (body) headers.push('"Content-Type": "application/json"');
  if (apiKey.get()) headers.push("Authorization: `Bearer ${process.env.ASSENT_API_KEY}`");
  const options = [`method: "${method}"`, `headers: { ${headers.join(", ")} }`];
  if (body) options.push(`body: JSON.stringify(${JSON.stringify(body, null, 2).replaceAll("\n", "\n  ")})`);
  const shown = path === CHAT ? "answer.choices[0].message.content" : "answer";
  return `const response = await fetch("${baseUrl}${path}", {
${options.map((option) => `  ${option},\n`).join("")}});
const answer = await response.json();
console.log(${shown});
`;
}

/** A value of JSON as Python writes it. */
function python(value, depth) {
  const indent = "    ".repeat(depth);
  const lines = (items, [open, close]) =>
    items.length ? `${open}\n${items.map((item) => `${indent}    ${item},\n`).join("")}${indent}${close}` : open + close;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return lines(value.map((item) => python(item, depth + 1)), "[]");
  if (typeof value === "object") {
    const items = Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, depth + 1)}`);
    return lines(items, "{}");
  }
  return JSON.stringify(value);
}
