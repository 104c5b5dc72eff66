"""GET / and /static/: the console, one page for operators and for trying the models.

GET /docs: the API's description.

The pages and their files need no API key; they ask for one when the service refuses their requests for data.
"""

from flask import Blueprint, Response, render_template

from app.http.auth import STATIC_PREFIX
from config import VERSION

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""Nothing of another host, no inline code. `blob:` and `data:` are images that the playground shows."""
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # asks again with the ETag each time, so that page and scripts are of one version after an update
    "Cache-Control": "no-cache",
}


def blueprint() -> Blueprint:
    """Make the blueprint."""
    routes = Blueprint(
        "console",
        __name__,
        template_folder="templates",
        static_folder="static",
        static_url_path=STATIC_PREFIX.rstrip("/"),
    )

    @routes.get("/")
    def page() -> str:
        return render_template("console.html", version=VERSION)

    @routes.get("/docs")
    def docs() -> str:
        return render_template("docs.html")

    @routes.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update(HEADERS)
        return response

    return routes
