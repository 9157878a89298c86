"""Runtime: random states, buffers and modes, processes, reductions and the names that wrappers add."""

from advvl.runtime.processes import check_agreement as check_agreement
from advvl.runtime.processes import collected as collected
from advvl.runtime.processes import global_mean as global_mean
from advvl.runtime.processes import process_count as process_count
from advvl.runtime.processes import process_index as process_index
from advvl.runtime.processes import process_mean as process_mean
from advvl.runtime.processes import share as share
