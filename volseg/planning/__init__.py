"""From a dataset to a plan: measure the cases once, then choose spacing, patch and network.

Numpy and scipy only, so that ``volseg plan`` answers at once.
"""

from volseg.planning.fingerprint import Fingerprint, compute_fingerprint
from volseg.planning.machine import Machine, describe_cpu
from volseg.planning.plan import NetworkPlan, Normalisation, Plan
from volseg.planning.planner import PlannedTraining, make_plan
from volseg.planning.writing import find_contradiction, plan_run, write_plan

__all__ = [
    "Fingerprint",
    "Machine",
    "NetworkPlan",
    "Normalisation",
    "Plan",
    "PlannedTraining",
    "compute_fingerprint",
    "describe_cpu",
    "find_contradiction",
    "make_plan",
    "plan_run",
    "write_plan",
]
