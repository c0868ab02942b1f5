"""All cases, of all files of them."""

from __future__ import annotations

from case import Case
from cases_assigned import CASES as ASSIGNED
from cases_gates import CASES as GATES
from cases_tasks import CASES as TASKS
from cases_top_k import CASES as TOP_K

__all__ = ["CASES", "Case"]

CASES: list[Case] = [*TOP_K, *ASSIGNED, *GATES, *TASKS]
