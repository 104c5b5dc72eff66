// The table of workers.

import { html } from "./ui.js";

/** What a state means, and its sign: states are never told by colour alone. */
const STATES = {
  ready: { sign: "●", means: "serves requests" },
  loading: { sign: "◔", means: "loads its model" },
  draining: { sign: "◑", means: "takes no more requests and finishes those it has" },
  drained: { sign: "○", means: "waits until it is resumed" },
  lost: { sign: "✕", means: "no sign of life" },
};

/** `rows`: those of /v1/workers, undefined until they are known. */
export function Workers({ rows }) {
  return html`<section aria-labelledby="workers-title">
    <h2 id="workers-title">Workers</h2>
    ${!rows ? html`<p class="empty">Loading …</p>` : rows.length === 0 ? html`<${None} />` : html`<${Table} rows=${rows} />`}
  </section>`;
}

function None() {
  return html`<p class="empty">No worker runs. <code>scripts/run</code> starts one for each model of the catalogue.</p>`;
}

function Table({ rows }) {
  return html`<table class="cards">
    <thead><tr>
      <th scope="col">Worker</th><th scope="col">State</th><th scope="col">Node</th><th scope="col" class="number">Running</th>
    </tr></thead>
    <tbody>${rows.map((worker) => html`<${Row} key=${worker.cid} worker=${worker} />`)}</tbody>
  </table>`;
}

function Row({ worker }) {
  return html`<tr>
    <th scope="row"><span class="name">${worker.name || worker.cid}</span><span class="detail">${worker.model}</span></th>
    <td data-label="State"><${State} state=${worker.state} /></td>
    <td data-label="Node"><${Node} worker=${worker} /></td>
    <td data-label="Running" class="number">${worker.running}</td>
  </tr>`;
}

function State({ state }) {
  const { sign, means } = STATES[state] ?? { sign: "?", means: "a state that this page does not know" };
  return html`<span class="state ${state in STATES ? state : "unknown"}" title=${means}>
    <span class="sign" aria-hidden="true">${sign}</span>${state}</span>`;
}

function Node({ worker }) {
  if (worker.registered) return "registered";
  return html`<span>not registered${worker.last_error && html`<span class="detail problem">${worker.last_error}</span>`}</span>`;
}
