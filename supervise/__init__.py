"""The supervisor that `scripts/run` starts: every process of the service in one terminal.

`process` keeps one process running, `plan` lists the processes, `preflight` checks the configuration before
any is started, `service` starts and stops them in order. docs/adr/0005-supervision.md says why no other
supervisor is used.
"""
