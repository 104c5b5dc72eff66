// One line for each model: its workers, its queue, its times.

import { firstTokens } from "./activity.js";
import { duration } from "./format.js";
import { html } from "./ui.js";

const WINDOW_S = 300;

/** `activity`: that of activity.js, undefined until it is known; `workers`: the rows of /v1/workers. */
export function Models({ activity, workers }) {
  return html`<section aria-labelledby="models-title">
    <h2 id="models-title">Models</h2>
    <table class="cards models">
      <thead><tr>
        <th scope="col">Model</th><th scope="col">Workers</th>
        <th scope="col" class="number">Running</th><th scope="col" class="number">Waiting</th>
        <th scope="col" class="number">First token, median</th><th scope="col" class="number">95 % within</th>
      </tr></thead>
      <tbody>
        ${activity.queues.map((queue) => html`<${Row} key=${queue.model} queue=${queue} activity=${activity} workers=${workers} />`)}
      </tbody>
    </table>
    <p class="note">Times to first token of the last ${WINDOW_S / 60} minutes, waiting included.</p>
  </section>`;
}

function Row({ queue, activity, workers }) {
  const { median, high } = firstTokens(activity, queue.model, WINDOW_S);
  return html`<tr>
    <th scope="row" class="name">${queue.model}</th>
    <td>${states((workers ?? []).filter((worker) => worker.model === queue.model))}</td>
    <td data-label="Running" class="number">${queue.running}</td>
    <td data-label="Waiting" class="number">${queue.waiting}</td>
    <td data-label="First token" class="number">${duration(median)}</td>
    <td data-label="95 % within" class="number">${duration(high)}</td>
  </tr>`;
}

/** "2 ready, 1 loading". */
function states(workers) {
  const counts = Map.groupBy(workers, (worker) => worker.state);
  const parts = [...counts].map(([state, found]) => `${found.length} ${state}`);
  return parts.length ? parts.join(", ") : html`<span class="problem">no worker</span>`;
}
