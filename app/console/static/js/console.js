// The operator's view: what the service does now, and what it did in the last minutes.

import { Refused, sendForJson } from "./api.js";
import { usePoll } from "./poll.js";
import { html, Notice } from "./ui.js";
import { Workers } from "./workers.js";
import { useCallback, useEffect } from "../vendor/preact-hooks.js";

const POLL_MS = 2000;

/** The view. `onLocked()` is called when the service does not accept the key any more. */
export function Console({ onLocked }) {
  const loadWorkers = useCallback(async (signal) => (await sendForJson("v1/workers", { signal })).data, []);
  const workers = usePoll(loadWorkers, POLL_MS);

  const locked = workers.error instanceof Refused && workers.error.status === 401;
  useEffect(() => {
    if (locked) onLocked();
  }, [locked]);

  return html`<main id="main">
    <h1 class="hidden">Console</h1>
    ${workers.error && html`<${Notice} kind="error">${capital(workers.error.message)}. Trying again …<//>`}
    <${Workers} rows=${workers.data} />
  </main>`;
}

function capital(text) {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
