"""Recipes: published methods, one per file, each a few parts and one citation."""

from advvl.recipes.free_at import free_at as free_at
from advvl.recipes.freelb import freelb as freelb
from advvl.recipes.lxmert_adv import lxmert_adv as lxmert_adv
from advvl.recipes.neftune import neftune as neftune
from advvl.recipes.pgd import pgd as pgd
from advvl.recipes.villa import villa as villa
