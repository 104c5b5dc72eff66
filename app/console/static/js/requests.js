// The requests that ended last.

import { ago, clock, count, duration, rate } from "./format.js";
import { html } from "./ui.js";
import { useState } from "../vendor/preact-hooks.js";

const SHOWN = 20;
const KINDS = {
  "/v1/chat/completions": "chat",
  "/v1/completions": "completion",
  "/v1/images/generations": "image",
  "/v1/images/edits": "edit",
  "/v1/embeddings": "embedding",
};

/** `requests`: those of activity.js; `now`: Unix time; `workers`: the rows of /v1/workers; `model`: "" for all. */
export function Requests({ requests, now, workers, model }) {
  const [failed, setFailed] = useState(false);
  const [all, setAll] = useState(false);
  const names = new Map((workers ?? []).map((worker) => [worker.cid, worker.name]));
  const chosen = requests.filter(
    (request) => (!model || request.model === model) && (!failed || request.outcome !== "completed"),
  );
  const shown = all ? chosen : chosen.slice(0, SHOWN);
  return html`<section aria-labelledby="requests-title">
    <div class="head">
      <h2 id="requests-title">Ended requests</h2>
      <label class="check">
        <input type="checkbox" checked=${failed} onChange=${(event) => setFailed(event.target.checked)} />
        Only those that did not complete
      </label>
    </div>
    ${shown.length === 0
      ? html`<p class="empty">${failed ? "None of the last requests failed or was cancelled." : "No request has ended yet."}</p>`
      : html`<table class="cards requests">
          <thead><tr>
            <th scope="col">Ended</th><th scope="col">Outcome</th><th scope="col">Request</th><th scope="col">Model</th>
            <th scope="col" class="number">Queued</th><th scope="col" class="number">First token</th>
            <th scope="col" class="number">Total</th><th scope="col" class="number">Result</th><th scope="col">Worker</th>
          </tr></thead>
          <tbody>${shown.map((request) => html`<${Row} key=${request.id} request=${request} now=${now} names=${names} />`)}</tbody>
        </table>`}
    ${chosen.length > SHOWN && html`<button type="button" class="quiet" onClick=${() => setAll(!all)}>
      ${all ? `Show the last ${SHOWN}` : `Show all ${chosen.length}`}</button>`}
  </section>`;
}

function Row({ request, now, names }) {
  const { outcome, status, cid } = request;
  return html`<tr>
    <td data-label="Ended" title=${clock(request.ended_at)}>${ago(now - request.ended_at)}</td>
    <td data-label="Outcome"><${Outcome} outcome=${outcome} status=${status} /></td>
    <td data-label="Request"><span class="what">${KINDS[request.route] ?? request.route}
      <span class="mono id" title=${request.id}>${request.id}</span></span></td>
    <td data-label="Model">${request.model}</td>
    <td data-label="Queued" class="number">${duration(request.queued_ms)}</td>
    <td data-label="First token" class="number">${duration(request.first_token_ms)}</td>
    <td data-label="Total" class="number">${duration(request.total_ms)}</td>
    <td data-label="Result" class="number"><${Result} request=${request} /></td>
    <td data-label="Worker"><span class="cut" title=${cid ?? ""}>${cid === null ? "–" : (names.get(cid) || cid)}</span></td>
  </tr>`;
}

function Outcome({ outcome, status }) {
  if (outcome === "completed") return html`<span class="outcome good"><span class="sign" aria-hidden="true">✓</span>completed</span>`;
  if (outcome === "cancelled") return html`<span class="outcome rest"><span class="sign" aria-hidden="true">–</span>client left</span>`;
  return html`<span class="outcome bad"><span class="sign" aria-hidden="true">✕</span>${outcome.replaceAll("_", " ")}
    ${status !== 200 && html` <span class="status-code">HTTP ${status}</span>`}</span>`;
}

function Result({ request }) {
  const { completion_tokens: tokens, prompt_tokens: prompt, images, first_token_ms: first, total_ms: total } = request;
  if (images !== null) return count(images, "image");
  if (tokens === null) return "–";
  if (tokens === 0) return count(prompt, "prompt token");
  const speed = tokens > 1 && first !== null && total > first ? rate(tokens - 1, total - first) : "";
  return html`<span title=${count(prompt, "prompt token")}>${count(tokens, "token")}
    ${speed && html`<span class="speed">${speed}</span>`}</span>`;
}
