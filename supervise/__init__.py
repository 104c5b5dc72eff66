"""What `scripts/run` runs: every process of the service in the foreground of one terminal (docs/adr/0005-supervision.md).

Reads bottom up: `process` keeps one process running, `plan` says which ones there are, `preflight` what must hold before
any is started, `service` in which order they come and go.
"""
