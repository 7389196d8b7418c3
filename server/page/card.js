// Shows a model card. Of Markdown it knows what cards are made of; anything else stays as it is written.

import { byId, el } from "./dom.js";

export function showCard(name, markdown) {
  byId("card-title").textContent = `The card of ${name}`;
  byId("card-body").replaceChildren(...render(markdown));
  byId("card").showModal();
}

/** Elements for a Markdown text: headings, paragraphs, lists, tables, code, and the facts at its head. */
export function render(markdown) {
  const lines = markdown.replaceAll("\r\n", "\n").split("\n");
  const elements = [];
  if (lines[0] === "---" && lines.indexOf("---", 1) > 0) {
    const facts = lines.splice(0, lines.indexOf("---", 1) + 1).slice(1, -1);
    elements.push(el("pre", { class: "facts" }, facts.join("\n")));
  }
  while (lines.length) {
    const [block] = BLOCKS.map(({ begins, read }) => (begins(lines[0]) ? read : null)).filter(Boolean);
    elements.push(block(lines));
  }
  return elements.filter(Boolean);
}

/** The lines from the first on for which the condition holds; takes them away. */
function take(lines, holds) {
  const end = lines.findIndex((line) => !holds(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

const isItem = (line) => /^\s*([-*]|\d+\.)\s/.test(line);
const isRow = (line) => line.trimStart().startsWith("|");
const isText = (line) => line.trim() !== "" && !/^(#|```)/.test(line) && !isItem(line) && !isRow(line);

const BLOCKS = [
  { begins: (line) => line.trim() === "", read: (lines) => void lines.shift() },
  {
    begins: (line) => line.startsWith("```"),
    read(lines) {
      lines.shift();
      const code = take(lines, (line) => !line.startsWith("```"));
      lines.shift();
      return el("pre", {}, el("code", {}, code.join("\n")));
    },
  },
  {
    begins: (line) => /^#{1,6} /.test(line),
    read(lines) {
      const [, marks, text] = lines.shift().match(/^(#+) (.*)/);
      return el(marks.length === 1 ? "h3" : "h4", {}, ...inline(text));
    },
  },
  {
    begins: isRow,
    read(lines) {
      const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
      const rows = take(lines, isRow).filter((line) => !/^[\s|:-]+$/.test(line)).map(cells);
      const [head, ...body] = rows.map((row, i) => el("tr", {}, ...row.map((cell) => el(i ? "td" : "th", {}, ...inline(cell.trim())))));
      return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head ?? ""), el("tbody", {}, ...body)));
    },
  },
  {
    begins: isItem,
    read(lines) {
      const items = take(lines, (line) => isItem(line) || /^\s+\S/.test(line)).join("\n").split(/\n(?=\s*(?:[-*]|\d+\.)\s)/);
      return el("ul", {}, ...items.map((item) => el("li", {}, ...inline(item.replace(/^\s*([-*]|\d+\.)\s+/, "").replace(/\n\s+/g, " ")))));
    },
  },
  { begins: () => true, read: (lines) => el("p", {}, ...inline([lines.shift(), ...take(lines, isText)].join(" "))) },
];

/** Code, bold text and links (as their text). */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*|\[[^\]]+\]\([^)]+\))/).map((part) => {
    if (/^`.+`$/.test(part)) return el("code", {}, part.slice(1, -1));
    if (/^\*\*.+\*\*$/.test(part)) return el("strong", {}, part.slice(2, -2));
    const link = part.match(/^\[([^\]]+)\]\(([^)]+)\)$/);
    return link ? `${link[1]} (${link[2]})` : part;
  });
}
