// The playground: chats and images, to try the models.

import { html } from "./ui.js";

/** The view. `models`: the rows of /v1/models, undefined until they are known. */
export function Playground() {
  return html`<main id="main"><h1>Playground</h1><p>It is being built.</p></main>`;
}
