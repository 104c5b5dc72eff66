// Fields for parameters of requests, of which most may be left empty.

import { html } from "./ui.js";
import { useEffect, useState } from "../vendor/preact-hooks.js";

const WIDE = matchMedia("(min-width: 56rem)");

/**
 * The numbers among `values`, by name, of those that are not empty. `names`: name to what people call it.
 * Throws Error for what is no number.
 */
export function numbersOf(values, names) {
  const found = {};
  for (const [name, label] of Object.entries(names)) {
    const text = values[name].trim().replace(",", ".");
    if (!text) continue;
    found[name] = Number(text);
    if (!Number.isFinite(found[name])) throw new Error(`${label} must be a number, or empty for the model's own.`);
  }
  return found;
}

/** A field for a number. `store` holds it in `params` under `name`. */
export function NumberField({ store, name, label, whole = false, empty = "default" }) {
  return html`<label class="field"><span>${label}</span>
    <input type="text" inputmode=${whole ? "numeric" : "decimal"} autocomplete="off" placeholder=${empty}
      value=${store.state.params[name]} onInput=${(event) => setParam(store, name, event.target.value)} /></label>`;
}

/** A field for a text of several lines. */
export function TextField({ store, name, label, rows = 3, placeholder = "" }) {
  return html`<label class="field"><span>${label}</span>
    <textarea rows=${rows} placeholder=${placeholder} value=${store.state.params[name]}
      onInput=${(event) => setParam(store, name, event.target.value)}></textarea></label>`;
}

/** A choice among the names of models. */
export function ModelField({ store, models }) {
  return html`<label class="field"><span>Model</span>
    <select value=${store.state.params.model} onChange=${(event) => setParam(store, "model", event.target.value)}>
      ${models.map(({ id }) => html`<option key=${id} value=${id}>${id}</option>`)}
    </select></label>`;
}

/** Change one parameter. */
export function setParam(store, name, value) {
  store.set({ params: { ...store.state.params, [name]: value } });
}

/** Parameters: beside the rest where there is room, else folded away above it. */
export function Aside({ title, children }) {
  const [wide, setWide] = useState(() => WIDE.matches);
  useEffect(() => {
    const note = () => setWide(WIDE.matches);
    WIDE.addEventListener("change", note);
    return () => WIDE.removeEventListener("change", note);
  }, []);
  if (wide) return html`<aside aria-label=${title}><h2>${title}</h2>${children}</aside>`;
  return html`<details class="aside"><summary>${title}</summary>${children}</details>`;
}
