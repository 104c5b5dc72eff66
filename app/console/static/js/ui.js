// What every part of the page uses to make elements: Preact with htm's templates.

import htm from "../vendor/htm.js";
import { h } from "../vendor/preact.js";

export const html = htm.bind(h);

/** A message in a box; `kind`: "info", "warning" or "error". Screen readers are told of it. */
export function Notice({ kind = "info", children }) {
  return html`<div class="notice ${kind}" role=${kind === "error" ? "alert" : "status"}>${children}</div>`;
}
