// The operator's view: what the service does now, and what it did in the last minutes.

import { activityLoader, series } from "./activity.js";
import { Refused, sendForJson } from "./api.js";
import { duration, shortDuration } from "./format.js";
import { Models } from "./models.js";
import { Plot } from "./plot.js";
import { usePoll, useTick } from "./poll.js";
import { Requests } from "./requests.js";
import { Status } from "./status.js";
import { html, Notice } from "./ui.js";
import { Workers } from "./workers.js";
import { useCallback, useEffect, useMemo, useState } from "../vendor/preact-hooks.js";

const POLL_MS = 2000;
const READINESS_POLL_MS = 4000;
const STALE_MS = 12000;

async function loadWorkers(signal) {
  return (await sendForJson("v1/workers", { signal })).data;
}

function loadReadiness(signal) {
  return sendForJson("readyz", { signal, accept: [503] });
}

/** The view. `onLocked()` is called when the service does not accept the key any more. */
export function Console({ onLocked }) {
  const workers = usePoll(loadWorkers, POLL_MS);
  const readiness = usePoll(loadReadiness, READINESS_POLL_MS);
  const activity = usePoll(useMemo(activityLoader, []), POLL_MS);
  const [model, setModel] = useState("");
  useTick(1000);

  const locked = [workers, activity].some(({ error }) => error instanceof Refused && error.status === 401);
  useEffect(() => {
    if (locked) onLocked();
  }, [locked]);
  const refresh = useCallback(() => {
    workers.refresh();
    activity.refresh();
    readiness.refresh();
  }, []);

  const forOthers = activity.error instanceof Refused && activity.error.status === 403;
  const found = activity.data;
  const now = found && found.now + (performance.now() - activity.at) / 1000;
  return html`<main id="main" class="console">
    <h1 class="hidden">Console</h1>
    <${Status} readiness=${readiness.data} failure=${failure(workers, activity, readiness)}
      since=${workers.at && (Date.now() - (performance.now() - workers.at)) / 1000} />
    ${forOthers && html`<${Notice}>This key is a client's. Queues, requests and drains are for operators.<//>`}
    ${found && html`<${Models} activity=${found} workers=${workers.data} />`}
    ${found && html`<${History} activity=${found} model=${model} setModel=${setModel} />`}
    <${Workers} rows=${workers.data} underDrain=${found?.underDrain} onChange=${refresh} />
    ${found && html`<${Requests} requests=${found.requests} now=${now} workers=${workers.data} model=${model} />`}
  </main>`;
}

/** Why the data is old, or null. What /readyz tells by itself, as of Redis, is not told again. */
function failure(workers, activity, readiness) {
  const redis = readiness.data?.redis ?? "ok";
  const polls = redis === "ok" ? [workers, readiness, activity] : [workers, readiness];
  const failed = polls.find(({ error }) => error && error.status !== 401 && error.status !== 403);
  if (failed) return failed.error.message;
  const stale = workers.at !== 0 && performance.now() - workers.at > STALE_MS;
  return stale ? "The data is old" : null;
}

function History({ activity, model, setModel }) {
  const lines = useMemo(() => series(activity, model), [activity, model]);
  const models = activity.queues.map((queue) => queue.model);
  return html`<section aria-labelledby="history-title">
    <div class="head">
      <h2 id="history-title">The last 15 minutes</h2>
      ${models.length > 1 && html`<label class="choice">Show
        <select value=${model} onChange=${(event) => setModel(event.target.value)}>
          <option value="">all models</option>
          ${models.map((name) => html`<option value=${name}>${name}</option>`)}
        </select></label>`}
    </div>
    <div class="plots">
      <${Plot} title="Requests" at=${lines.at} whole=${true} text=${String} axis=${String} empty="Nothing is known yet."
        lines=${[
          { name: "Running", values: lines.running },
          { name: "Waiting", values: lines.waiting, dashed: true },
        ]} />
      <${Plot} title="Time to first token" at=${lines.at} text=${duration} axis=${shortDuration} empty="No chat in this time."
        lines=${[
          { name: "Median", values: lines.median },
          { name: "95 % within", values: lines.high, dashed: true },
        ]} />
    </div>
  </section>`;
}
