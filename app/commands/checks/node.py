"""Checks of the network node: whether it answers, and whether it lists the workers that it should."""

from collections.abc import Iterator, Sequence

from app.commands.checks.finding import Finding, failed, passed, warned
from node.cli import compare
from node.client import NodeClient, NodeError
from node.deployment import Deployment, Mark
from protocol.leases import WorkerRecord

TIMEOUT_S = 15.0


def check_node(deployment: Deployment, records: Sequence[WorkerRecord] | None) -> Iterator[Finding]:
    """`records`: None if they could not be read."""
    url = deployment.settings.node_url
    if not url:
        yield passed("node", "NODE_URL is empty: models are not registered")
        return
    try:
        entries = NodeClient(url, timeout_s=TIMEOUT_S).models()
    except NodeError as error:
        yield failed("node", f"{error}; start the node or correct NODE_URL (empty: no registration)")
        return
    yield passed("node", f"{url} answers and lists {len(entries)} models")
    if records is None:
        yield warned("registrations", "not checked: without Redis the workers are unknown")
        return
    rows = compare(entries, list(records), deployment)
    marks = {mark: [row.entry for row in rows if row.mark is mark] for mark in Mark}
    if missing := marks[Mark.MISSING]:
        cids = {entry.cid for entry in missing}
        reasons = {record.last_error for record in records if record.cid in cids and record.last_error}
        why = "; ".join(sorted(reasons)) or "it may have become ready a moment ago: try again"
        yield failed("registrations", f"{len(missing)} ready workers are not registered: {why}")
    elif stale := marks[Mark.STALE]:
        names = ", ".join(sorted(entry.cid for entry in stale))
        yield warned(
            "registrations",
            f"no worker stands for {names}: the service removes them within 90 s, `node prune` at once",
        )
    elif marks[Mark.CHANGING]:
        yield warned("registrations", "entries are being changed; `node list` shows them")
    else:
        yield passed("registrations", f"all {len(marks[Mark.OK])} ready workers of this node are registered")
