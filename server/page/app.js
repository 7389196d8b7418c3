// Starts the page: views, theme, key, and what the server has.

import { apiKey, connection } from "./api.js";
import { setUpCompare } from "./compare.js";
import { byId } from "./dom.js";
import { errorBox, openKeyDialog } from "./errors.js";
import { setUpFeedback } from "./feedback.js";
import { setUpProxies } from "./proxies.js";
import { loadSession, session } from "./session.js";
import { setUpSnippets } from "./snippets.js";
import { setUpTournament } from "./tournament.js";

const VIEWS = ["compare", "best-of", "proxies"];
const THEME = "assent-theme";

function showView() {
  const name = location.hash.slice(1) || VIEWS[0];
  if (!VIEWS.includes(name)) return; // the link to the content
  for (const view of VIEWS) {
    byId(`view-${view}`).hidden = view !== name;
    const link = document.querySelector(`nav a[href="#${view}"]`);
    if (view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  scrollTo(0, 0);
}

function setUpTheme() {
  const select = byId("theme");
  const apply = () => (document.documentElement.dataset.theme = select.value);
  select.value = localStorage.getItem(THEME) ?? "";
  apply();
  select.addEventListener("change", () => {
    localStorage.setItem(THEME, select.value);
    apply();
  });
}

function setUpDialogs() {
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
}

function setUpKey() {
  byId("open-key").addEventListener("click", openKeyDialog);
  byId("key-form").addEventListener("submit", () => {
    apiKey.set(byId("key").value.trim());
    byId("key").value = "";
    start();
  });
  connection.addEventListener("unauthorized", openKeyDialog);
}

function setStatus(text, state) {
  const status = byId("status");
  if (status.textContent !== text) status.textContent = text;
  status.dataset.state = state;
}

function setUpStatus() {
  connection.addEventListener("gone", () => setStatus("No answer from the server", "gone"));
  const serving = () => session.model && setStatus(session.model, "serving");
  connection.addEventListener("answered", serving);
  session.addEventListener("change", serving);
}

async function start() {
  byId("page-error").replaceChildren();
  try {
    await loadSession();
  } catch (error) {
    if (error.status) setStatus("Not connected", "gone");
    byId("page-error").replaceChildren(errorBox(error, start));
  }
}

setUpTheme();
setUpDialogs();
setUpKey();
setUpStatus();
setUpSnippets();
setUpCompare();
setUpTournament();
setUpProxies();
setUpFeedback();
addEventListener("hashchange", showView);
showView();
start();
