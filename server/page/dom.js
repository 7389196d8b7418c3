// Makes elements. Texts go in as text, never as HTML: what a model says is not to be trusted.

/** An element with attributes, `on...` listeners and children; null children are left out. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(key, value);
    else if (value != null) element.setAttribute(key, value);
  }
  return replace(element, ...children);
}

/** Give an element these children instead of its own; null is none. */
export function replace(element, ...children) {
  element.replaceChildren(...children.filter((child) => child != null));
  return element;
}

export const byId = (id) => document.getElementById(id);

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

/** Fill a <select>, and keep what is selected where it is still there. */
export function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => el("option", { value }, text)));
  if (options.some(([value]) => value === before)) select.value = before;
}

/** Tell people who use a screen reader what others see. */
export function announce(text) {
  byId("announcer").textContent = text;
}

export const percent = (p) => `${Math.round(p * 100)} %`;
