"""`flask --app wsgi doctor`: checks what the service needs, and says what to do."""

import json
from collections.abc import Iterator, Sequence

import click
from redis.exceptions import RedisError

from app.commands.checks.finding import Finding, Status, passed, warned
from app.commands.checks.gpu import check_gpus
from app.commands.checks.machine import check_descriptors, check_weights
from app.commands.checks.node import check_node
from app.commands.checks.redis import check_data, check_server
from app.commands.checks.web import check_web
from catalogue import Catalogue
from config import Settings
from node.deployment import Deployment
from protocol.connections import RedisClient
from protocol.leases import Leases, WorkerRecord


def doctor_command(
    settings: Settings, catalogue: Catalogue, deployment: Deployment, client: RedisClient, leases: Leases
) -> click.Command:
    """Make the command `doctor`. Nothing connects before it runs."""

    @click.command("doctor", short_help="Check what the service needs.")
    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
    @click.pass_context
    def doctor(context: click.Context, as_json: bool) -> None:
        """Check Redis, node, ports, URLs, GPUs, disks, clock and limits of this machine.

        A line for each: PASS, WARN, or FAIL with what to do. The status is 1 if anything fails.
        """
        findings = []
        for finding in examine(settings, catalogue, deployment, client, leases):
            findings.append(finding)
            if not as_json:
                click.echo(f"{finding.status}  {_one_line(finding.check)}: {_one_line(finding.message)}")
        healthy = all(finding.status is not Status.FAIL for finding in findings)
        if as_json:
            click.echo(_as_json(findings, healthy))
        context.exit(0 if healthy else 1)

    return doctor


def examine(
    settings: Settings, catalogue: Catalogue, deployment: Deployment, client: RedisClient, leases: Leases
) -> Iterator[Finding]:
    """Make all checks, one after another."""
    yield from _check_settings(settings)
    redis = check_server(settings.redis_url, deployment.namespace)
    yield redis
    records = None
    if redis.status is Status.PASS:
        yield from check_data(client)
        records = _workers(leases)
    else:
        yield warned("clock", "not checked: Redis must answer first")
    yield from check_node(deployment, records)
    yield from check_web(settings, deployment.namespace, catalogue)
    yield from check_gpus(settings, catalogue)
    yield from check_weights(catalogue, records)
    yield check_descriptors()


def _check_settings(settings: Settings) -> Iterator[Finding]:
    surprises = settings.warnings()
    for surprise in surprises:
        yield warned("settings", surprise)
    if not surprises:
        yield passed("settings", "settings and catalogue can be read")


def _workers(leases: Leases) -> list[WorkerRecord] | None:
    """All records, None if Redis has failed since it was checked."""
    try:
        return leases.workers()
    except RedisError:
        return None


def _as_json(findings: Sequence[Finding], healthy: bool) -> str:
    checks = [
        {"check": finding.check, "status": finding.status, "message": finding.message} for finding in findings
    ]
    return json.dumps({"ok": healthy, "checks": checks}, indent=2, ensure_ascii=False)


def _one_line(text: str) -> str:
    """The text for a terminal: names of others may hold control characters."""
    return text if text.isprintable() else ascii(text)
