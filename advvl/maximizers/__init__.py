"""Inner maximisers: they decide which passes to run, at which perturbations. One maximiser per file."""

from advvl.maximizers.auto_pgd import AutoPGD as AutoPGD
from advvl.maximizers.base import AscentState as AscentState
from advvl.maximizers.base import InnerMaximizer as InnerMaximizer
from advvl.maximizers.base import Order as Order
from advvl.maximizers.eot import EOT as EOT
from advvl.maximizers.free_at import FreeAT as FreeAT
from advvl.maximizers.freelb import FreeLB as FreeLB
from advvl.maximizers.held import Held as Held
from advvl.maximizers.minimum_norm import MinimumNorm as MinimumNorm
from advvl.maximizers.pgd import PGD as PGD
from advvl.maximizers.probes import Feedback as Feedback
from advvl.maximizers.probes import Probe as Probe
from advvl.maximizers.random_search import RandomSearch as RandomSearch
