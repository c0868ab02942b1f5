"""Every router: what it is called, what it needs, and what its formula was checked against. Data alone.

A router without a `source` was written from memory and is *unverified*: it is offered, labelled so, and not counted.
"""

from __future__ import annotations

from moectl.routers.entry import Entry
from moectl.routers.table.architectures import ARCHITECTURES
from moectl.routers.table.assigned import ASSIGNED
from moectl.routers.table.gates import GATES
from moectl.routers.table.tasks import TASKS
from moectl.routers.table.top_k import TOP_K

ROUTERS: tuple[Entry, ...] = (*TOP_K, *ASSIGNED, *GATES, *TASKS, *ARCHITECTURES)
