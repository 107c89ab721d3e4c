"""What will run, decided once, with a reason for every choice."""

from training_framework.plan.planned_run import PlannedRun, UserLoaders, plan_run
from training_framework.plan.planner import make_plan
from training_framework.plan.resumption import resumed_plan
from training_framework.plan.train_plan import Choice, TrainPlan

__all__ = [
    "Choice",
    "PlannedRun",
    "TrainPlan",
    "UserLoaders",
    "make_plan",
    "plan_run",
    "resumed_plan",
]
