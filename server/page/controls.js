// Fields of a form that know their value.

import { el } from "./dom.js";

let number = 0;

/** A slider. value: null = none until it is moved. format: (value) => what is shown beside it. onchange: called when it is let go. */
export function slider({ label, min, max, step, value, format = String, onchange = () => {} }) {
  const id = `slider-${++number}`;
  const output = el("output", { for: id });
  const input = el("input", { id, type: "range", min, max, step, value });
  const show = (value) => {
    field.value = value;
    output.textContent = format(value);
    input.setAttribute("aria-valuetext", format(value));
  };
  const field = { element: el("div", { class: "field" }, el("label", { for: id }, label), output, input) };
  show(value);
  input.addEventListener("input", () => show(Number(input.value)));
  input.addEventListener("change", onchange);
  return field;
}

/** The temperature of a request, of which `fields` has nothing until it is moved: then the model's own is used. */
export function temperatureSlider({ min, onchange }) {
  const field = slider({
    label: "Temperature",
    ...{ min, max: 1.5, step: 0.1, value: null },
    format: (value) => (value === null ? "the model's default" : value.toFixed(1)),
    onchange,
  });
  return {
    element: field.element,
    get fields() {
      return field.value === null ? {} : { temperature: field.value };
    },
  };
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
