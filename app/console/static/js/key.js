// Asks for the API key.

import { Refused, sendForJson, setKey } from "./api.js";
import { html, Notice } from "./ui.js";
import { useEffect, useRef, useState } from "../vendor/preact-hooks.js";

/** A form for the key. `onAccepted()` is called when the service has accepted one. */
export function KeyForm({ onAccepted }) {
  const [value, setValue] = useState("");
  const [problem, setProblem] = useState("");
  const [busy, setBusy] = useState(false);
  const field = useRef(null);
  useEffect(() => field.current.focus(), []);

  async function submit(event) {
    event.preventDefault();
    setBusy(true);
    setProblem("");
    setKey(value.trim());
    try {
      await sendForJson("v1/workers");
      onAccepted();
    } catch (error) {
      setKey("");
      const wrong = error instanceof Refused && error.status === 401;
      setProblem(wrong ? "The service does not know this key." : `The key could not be checked: ${error.message}.`);
      setBusy(false);
      field.current.focus();
    }
  }

  return html`<form class="key-form" onSubmit=${submit}>
    <h2>This service needs an API key</h2>
    <p>One of <code>API_KEYS</code> in its settings. It stays in this tab until you close it.</p>
    <label for="key">API key</label>
    <div class="row">
      <input id="key" type="password" autocomplete="off" spellcheck=${false} required ref=${field}
        value=${value} onInput=${(event) => setValue(event.target.value)} />
      <button type="submit" class="primary" disabled=${busy}>Use this key</button>
    </div>
    ${problem && html`<${Notice} kind="error">${problem}<//>`}
  </form>`;
}
