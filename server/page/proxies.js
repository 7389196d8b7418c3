// The view "Proxies": what is loaded, its cards, and changes with an administrator's key.

import { ApiError, json, send } from "./api.js";
import { showCard } from "./card.js";
import { button, byId, el } from "./dom.js";
import { errorBox } from "./errors.js";
import { loadSession, session } from "./session.js";
import { openSnippets } from "./snippets.js";

const EVERY = 5000; // milliseconds, while the view is open

function proxyCard(proxy) {
  const { name, version, state, in_flight: inFlight, base, training } = proxy;
  const facts = [
    ["version", el("code", {}, version)],
    ["requests in flight", el("span", { class: "number" }, String(inFlight))],
    ["trained for", base?.name ?? "unknown"],
    ["parameters", proxy.num_parameters?.toLocaleString("en") ?? "unknown"],
    ["candidates", `at most ${proxy.max_candidates}, T₀ ${proxy.temperature}`],
    ...scores(training),
  ];
  const unloadPath = `proxies/${encodeURIComponent(name)}?version=${version}`;
  const result = el("div", {});
  const unload = async () => {
    if (!confirm(`Unload ${name} ${version}? Requests under way keep it to their end.`)) return;
    try {
      await send({ method: "DELETE", path: unloadPath });
      await loadSession();
    } catch (error) {
      result.replaceChildren(errorBox(error, error.status === 403 ? null : unload));
    }
  };
  const card = async () => {
    try {
      const response = await send({ method: "GET", path: `proxies/${encodeURIComponent(name)}/card` });
      showCard(name, await response.text());
    } catch (error) {
      result.replaceChildren(errorBox(error));
    }
  };
  return el(
    "article",
    { class: "proxy", "data-name": name, "data-version": version },
    el("header", { class: "row" }, el("h2", {}, name), el("span", { class: `badge ${state}` }, state)),
    el("dl", {}, ...facts.flatMap(([term, value]) => [el("dt", {}, term), el("dd", {}, value)])),
    el(
      "div",
      { class: "row" },
      button("Card", card),
      button("Unload", unload),
      button("Copy request", () => openSnippets(unloadPath, undefined, "DELETE"), { class: "quiet" }),
    ),
    result,
  );
}

/** The first figures that training measured last, with their standard errors. */
function scores(training) {
  const last = training?.last ?? {};
  const isFigure = ([name, value]) => typeof value === "number" && name !== "step" && !name.endsWith("_se");
  const error = (name) => (`${name}_se` in last ? ` ± ${last[`${name}_se`].toPrecision(1)}` : "");
  const figures = Object.entries(last).filter(isFigure).slice(0, 3);
  return figures.map(([name, value]) => [name.replaceAll("_", " "), value.toPrecision(3) + error(name)]);
}

/** Draw the list anew where it has changed; otherwise only the numbers. */
function draw() {
  const list = byId("proxy-list");
  const identify = (proxies) => JSON.stringify(proxies.map(({ name, version, state }) => [name, version, state]));
  if (list.dataset.shown !== identify(session.proxies)) {
    list.dataset.shown = identify(session.proxies);
    list.replaceChildren(...session.proxies.map(proxyCard));
    if (!session.proxies.length) list.append(el("p", { class: "muted" }, "No proxy is loaded."));
  }
  session.proxies.forEach((proxy, i) => (list.children[i].querySelector(".number").textContent = proxy.in_flight));
  const isAdmin = session.proxies.every((proxy) => "directory" in proxy);
  byId("load-hint").textContent = isAdmin
    ? "Under a name in use it replaces the earlier version. Load the older one again to roll back."
    : "This needs an administrator's key.";
}

async function refresh() {
  if (byId("view-proxies").hidden || document.hidden || !session.model) return;
  try {
    session.proxies = (await json("GET", "proxies")).data;
    draw();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error; // the header says that the server is gone
  }
}

export function setUpProxies() {
  const request = () => ({
    name: byId("load-name").value.trim(),
    path: byId("load-path").value.trim(),
    shadow: byId("load-shadow").checked,
  });
  byId("load-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const result = byId("load-result");
    try {
      const { name, version, state } = await json("POST", "proxies", request());
      await loadSession();
      result.replaceChildren(el("p", { class: "kept" }, `Loaded: ${name} ${version} (${state}).`));
    } catch (error) {
      result.replaceChildren(errorBox(error));
    }
  });
  byId("load-copy").addEventListener("click", () => openSnippets("proxies", request()));
  session.addEventListener("change", draw);
  addEventListener("hashchange", refresh);
  setInterval(refresh, EVERY);
}
