"""Recipes: published methods, one per file, each a few parts and one citation."""

from advvl.recipes.dat import dat as dat
from advvl.recipes.fare import fare as fare
from advvl.recipes.free_at import free_at as free_at
from advvl.recipes.freelb import freelb as freelb
from advvl.recipes.lxmert_adv import lxmert_adv as lxmert_adv
from advvl.recipes.neftune import neftune as neftune
from advvl.recipes.pgd import pgd as pgd
from advvl.recipes.smart import smart as smart
from advvl.recipes.tecoa import tecoa as tecoa
from advvl.recipes.trades import trades as trades
from advvl.recipes.vat import vat as vat
from advvl.recipes.villa import villa as villa
from advvl.recipes.villa_uniter import villa_uniter as villa_uniter
from advvl.recipes.vilta import vilta as vilta
