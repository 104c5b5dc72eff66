// The page /docs: shows /openapi.json with Swagger UI, and asks for a key where the service wants one.

import { hasKey, keyHeaders, Refused, sendForJson } from "./api.js";
import { KeyForm } from "./key.js";
import { html, Notice } from "./ui.js";
import { render } from "../vendor/preact.js";

const root = document.getElementById("docs");
const dark = matchMedia("(prefers-color-scheme: dark)");

function followScheme() {
  document.documentElement.classList.toggle("dark-mode", dark.matches);
}

async function show() {
  let description;
  try {
    description = await sendForJson("openapi.json");
  } catch (error) {
    const locked = error instanceof Refused && error.status === 401;
    render(
      locked
        ? html`<${KeyForm} onAccepted=${show} />`
        : html`<${Notice} kind="error">The description could not be loaded: ${error.message}.<//>`,
      root,
    );
    return;
  }
  render(null, root);
  // requests go to where the page came from: nothing else is allowed by its policy
  description.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];
  const viewer = SwaggerUIBundle({
    spec: description,
    domNode: root,
    deepLinking: true,
    displayRequestDuration: true,
    validatorUrl: null,
    onComplete() {
      if (hasKey()) viewer.preauthorizeApiKey("bearer", keyHeaders().Authorization.slice("Bearer ".length));
    },
  });
}

followScheme();
dark.addEventListener("change", followScheme);
root.replaceChildren();
show();
