"""All switches, in the order in which they are chosen and applied."""

from training_framework.switches.arithmetic import ARITHMETIC
from training_framework.switches.augmentations import AUGMENTATIONS
from training_framework.switches.cpu_kernels import CPU_KERNELS
from training_framework.switches.data_path import DATA_PATH
from training_framework.switches.methods import METHODS
from training_framework.switches.networks import NETWORKS
from training_framework.switches.processes import PROCESSES
from training_framework.switches.short_runs import SHORT_RUNS
from training_framework.switches.switch import Switch
from training_framework.switches.updates import UPDATES

__all__ = ["SWITCHES"]

# A switch may read the values of those before it: the kernels depend on precision and layout, which
# ARITHMETIC chooses, and skip the norms that PROCESSES synchronizes.
SWITCHES: tuple[Switch, ...] = (
    *ARITHMETIC,
    *PROCESSES,
    *CPU_KERNELS,
    *DATA_PATH,
    *METHODS,
    *NETWORKS,
    *UPDATES,
    *AUGMENTATIONS,
    *SHORT_RUNS,
)
