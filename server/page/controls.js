// Fields of a form that know their value.

import { el } from "./dom.js";

let number = 0;

/** A slider. format: (value) => what is shown beside it. onchange: called when it is let go. */
export function slider({ label, min, max, step, value, format = String, onchange = () => {} }) {
  const id = `slider-${++number}`;
  const output = el("output", { for: id }, format(value));
  const input = el("input", { id, type: "range", min, max, step, value });
  const show = () => {
    field.value = Number(input.value);
    output.textContent = format(field.value);
    input.setAttribute("aria-valuetext", format(field.value));
  };
  const set = (next) => {
    input.value = String(next);
    show();
  };
  const field = { element: el("div", { class: "field" }, el("label", { for: id }, label), output, input), value, set };
  input.addEventListener("input", show);
  input.addEventListener("change", onchange);
  return field;
}

export function numberField({ label, min, max, value, onchange = () => {} }) {
  const input = el("input", { type: "number", min, max, value, required: true });
  input.addEventListener("change", () => input.checkValidity() && onchange());
  const set = (next) => (input.value = String(next));
  return { element: el("label", { class: "field" }, label, input), get: () => Number(input.value), set };
}

export function selectField({ label, options, onchange = () => {} }) {
  const select = el("select", { onchange });
  select.append(...options.map(([value, text]) => el("option", { value }, text)));
  return { element: el("label", { class: "field" }, label, select), select };
}
