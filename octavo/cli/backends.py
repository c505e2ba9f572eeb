"""`octavo backends`: which kernels serve which op on this machine, and why."""

from __future__ import annotations

import argparse
import dataclasses

from octavo.cli.machine import describe_machine, machine_line
from octavo.cli.terminal import Answer, Terminal
from octavo.cli.verb import Verbs, new_verb
from octavo.tables import Table

__all__ = ["add_parser", "run"]


def add_parser(verbs: Verbs) -> None:
    """`octavo backends`."""
    new_verb(verbs, "backends", "tell which kernels serve which op here, and why", "octavo backends", run)


def run(args: argparse.Namespace, terminal: Terminal) -> Answer:
    """Show `octavo.backends()` and a description of the machine."""
    from octavo.ops import backends

    serving = backends()
    machine = describe_machine()
    rows = tuple((row.op, row.device, row.backend, row.why) for row in serving)
    return Answer(
        {"ops": [dataclasses.asdict(row) for row in serving], "machine": machine},
        (Table("Ops", ("op", "device", "backend", "why"), rows), machine_line(machine)),
    )
