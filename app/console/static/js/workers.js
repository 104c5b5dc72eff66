// The table of workers, and their drains.

import { sendForJson } from "./api.js";
import { gibibytes, percent } from "./format.js";
import { html, Notice } from "./ui.js";
import { useCallback, useEffect, useRef, useState } from "../vendor/preact-hooks.js";

/** What a state means, and its sign: states are never told by colour alone. */
const STATES = {
  ready: { sign: "●", means: "serves requests" },
  loading: { sign: "◔", means: "loads its model" },
  draining: { sign: "◑", means: "takes no more requests and finishes those it has" },
  drained: { sign: "○", means: "waits until it is resumed" },
  lost: { sign: "✕", means: "no sign of life" },
  stopped: { sign: "□", means: "does not run; it would wait until it is resumed" },
};

/**
 * `rows`: those of /v1/workers, undefined until they are known; `underDrain`: names, undefined if this key may not
 * drain; `onChange()` is called after a drain or a resume.
 */
export function Workers({ rows, underDrain, onChange }) {
  const [problem, setProblem] = useState("");
  const act = useCallback(async (worker, action) => {
    setProblem("");
    try {
      const id = encodeURIComponent(worker.cid || worker.name);
      await sendForJson(`v1/workers/${id}/${action}`, { method: "POST", json: {} });
    } catch (error) {
      setProblem(`${worker.name}: ${error.message}.`);
    }
    onChange();
  }, [onChange]);

  return html`<section aria-labelledby="workers-title">
    <h2 id="workers-title">Workers</h2>
    ${problem && html`<${Notice} kind="error">${problem}<//>`}
    ${!rows ? html`<p class="empty">Loading …</p>` : html`<${Table} rows=${rows} underDrain=${underDrain} act=${act} />`}
  </section>`;
}

function Table({ rows, underDrain, act }) {
  const running = new Set(rows.map((worker) => worker.name));
  const stopped = [...(underDrain ?? [])].filter((name) => !running.has(name));
  if (rows.length + stopped.length === 0) {
    return html`<p class="empty">No worker runs. <code>scripts/run</code> starts those of the catalogue.</p>`;
  }
  return html`<table class="cards">
    <thead><tr>
      <th scope="col">Worker</th><th scope="col">State</th><th scope="col">Node</th><th scope="col">Running</th>
      <th scope="col">GPU</th>
      ${underDrain && html`<th scope="col"><span class="hidden">Actions</span></th>`}
    </tr></thead>
    <tbody>
      ${rows.map((worker) => html`<${Row} key=${worker.cid} worker=${worker} rows=${rows} underDrain=${underDrain} act=${act} />`)}
      ${stopped.map((name) => html`<${Stopped} key=${name} name=${name} act=${act} />`)}
    </tbody>
  </table>`;
}

function Row({ worker, rows, underDrain, act }) {
  return html`<tr>
    <th scope="row">
      <span class="name">${worker.name || worker.cid}</span>
      <span class="detail">${worker.model} · process ${worker.pid}</span>
    </th>
    <td data-label="State"><${State} state=${worker.state} /></td>
    <td data-label="Node"><${Node} worker=${worker} /></td>
    <td data-label="Running"><${Load} worker=${worker} /></td>
    <td data-label="GPU"><${Gpu} worker=${worker} /></td>
    ${underDrain && html`<td class="actions"><${Actions} worker=${worker} rows=${rows} drained=${underDrain.has(worker.name)} act=${act} /></td>`}
  </tr>`;
}

function Stopped({ name, act }) {
  return html`<tr>
    <th scope="row"><span class="name">${name}</span></th>
    <td data-label="State"><${State} state="stopped" /></td>
    <td class="blank"></td><td class="blank"></td><td class="blank"></td>
    <td class="actions"><${Button} label="Resume" of=${name} run=${() => act({ name }, "resume")} /></td>
  </tr>`;
}

function State({ state }) {
  const { sign, means } = STATES[state] ?? { sign: "?", means: "a state that this page does not know" };
  return html`<span class="state ${state in STATES ? state : "unknown"}" title=${means}>
    <span class="sign" aria-hidden="true">${sign}</span>${state}</span>`;
}

function Node({ worker }) {
  if (worker.registered) return "registered";
  if (worker.registered === null) return "does not know this task";
  return html`<span>not registered${worker.last_error && html`<span class="detail problem">${worker.last_error}</span>`}</span>`;
}

/** Requests of slots, and how full the cache is. */
function Load({ worker }) {
  const { running, slots, kv_cache_usage: cache } = worker;
  return html`<div class="load">
    <span>${running}${slots ? ` of ${slots}` : ""}</span>
    ${slots > 0 && html`<meter min="0" max=${slots} value=${running} aria-hidden="true"></meter>`}
    ${cache !== null && cache !== undefined && html`<span class="detail">KV cache ${percent(cache)}</span>`}
  </div>`;
}

function Gpu({ worker }) {
  const { gpu, gpus } = worker;
  if (!gpu) return html`<span class="detail">${gpus.length ? `GPU ${gpus.join(", ")}: the driver tells nothing` : "none"}</span>`;
  const facts = [
    gpu.utilization !== null && `${percent(gpu.utilization)} busy`,
    gpu.temperature_c !== null && `${gpu.temperature_c} °C`,
  ].filter(Boolean);
  return html`<div class="load">
    <span>${gibibytes(gpu.memory_used_bytes)} of ${gibibytes(gpu.memory_total_bytes)}</span>
    <meter min="0" max=${gpu.memory_total_bytes} value=${gpu.memory_used_bytes} aria-hidden="true"></meter>
    ${facts.length > 0 && html`<span class="detail">${facts.join(" · ")}</span>`}
  </div>`;
}

/** Drain or resume. To drain the last ready worker of a model takes a second click. */
function Actions({ worker, rows, drained, act }) {
  const [asking, setAsking] = useState(false);
  const place = useRef(null);
  if (!worker.name || (worker.state === "lost" && !drained)) return null;

  const others = rows.some((row) => row.model === worker.model && row.cid !== worker.cid && row.state === "ready");
  const drain = () => (others || worker.state !== "ready" ? act(worker, "drain") : setAsking(true));
  const close = () => {
    setAsking(false);
    // the button with the focus goes
    requestAnimationFrame(() => place.current?.querySelector("button")?.focus());
  };
  let buttons;
  if (asking) {
    buttons = html`<span key="why">No other worker of ${worker.model} is ready.</span>
      <${Button} key="yes" label="Drain it" of=${worker.name} focus=${true} run=${() => act(worker, "drain").then(close)} />
      <${Button} key="no" label="Keep it" of=${worker.name} run=${close} />`;
  } else if (drained) {
    buttons = html`<${Button} key="act" label="Resume" of=${worker.name} run=${() => act(worker, "resume")} />`;
  } else {
    buttons = html`<${Button} key="act" label="Drain" of=${worker.name} run=${drain} />`;
  }
  return html`<div class="ask" ref=${place}>${buttons}</div>`;
}

/** A button about a worker, which does nothing more until what it runs has ended. */
function Button({ label, of, run, focus = false }) {
  const [busy, setBusy] = useState(false);
  const button = useRef(null);
  useEffect(() => {
    if (focus) button.current.focus();
  }, []);
  const click = async () => {
    if (busy) return;
    setBusy(true);
    await run();
    setBusy(false);
  };
  // not `disabled`, which would take the focus away
  return html`<button type="button" ref=${button} aria-disabled=${busy} onClick=${click}>
    ${label}<span class="hidden"> ${of}</span>
  </button>`;
}
