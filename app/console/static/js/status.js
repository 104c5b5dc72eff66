// Whether the service is ready, and what should be looked at.

import { clock, withCode } from "./format.js";
import { html, Notice } from "./ui.js";

/**
 * `readiness`: the body of /readyz, undefined until it is known. `failure`: why the data is old, or null; `since`: the
 * Unix time of the last data.
 */
export function Status({ readiness, failure, since }) {
  return html`<section class="status" aria-label="Status">
    ${failure && html`<${Notice} kind="error">
      <strong>${capital(failure)}.</strong> ${since ? `What is shown is from ${clock(since)}.` : ""} Trying again …
    <//>`}
    ${readiness && !failure && html`<${Readiness} readiness=${readiness} />`}
  </section>`;
}

function Readiness({ readiness }) {
  const { redis, models_without_worker: missing = [], warnings = [] } = readiness;
  const ready = readiness.code === 0;
  return html`
    ${redis?.startsWith("unreachable") && html`<${Notice} kind="error">
      <strong>Redis can't be reached.</strong> No request can be served. What is shown is the last that was known.
    <//>`}
    ${redis?.startsWith("refuses") && html`<${Notice} kind="error">
      <strong>Redis ${redis}.</strong> No request can be served.
    <//>`}
    ${redis === "ok" && missing.length > 0 && html`<${Notice} kind="error">
      <strong>Not ready.</strong> No worker serves ${list(missing)}.
    <//>`}
    ${ready && html`<p class="ready"><span aria-hidden="true">●</span> Ready: every model has a worker.</p>`}
    ${warnings.length > 0 && html`<div class="notice warning" role="status">
      <h2>${warnings.length === 1 ? "To look at" : `${warnings.length} things to look at`}</h2>
      <ul>${warnings.map((text) => html`<li key=${text}>${withCode(text, html)}</li>`)}</ul>
    </div>`}`;
}

function list(names) {
  return names.length < 2 ? names.join() : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
