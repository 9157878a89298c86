"""Recipes: published methods, one per file, each a few parts and one citation."""

from advvl.recipes.agft import agft as agft
from advvl.recipes.alum import alum as alum
from advvl.recipes.awp import awp as awp
from advvl.recipes.cat import cat as cat
from advvl.recipes.circuit_breakers import circuit_breakers as circuit_breakers
from advvl.recipes.embedding_attack import embedding_attack as embedding_attack
from advvl.recipes.fare import fare as fare
from advvl.recipes.fgm import fgm as fgm
from advvl.recipes.fgsm_rs import fgsm_rs as fgsm_rs
from advvl.recipes.free_at import free_at as free_at
from advvl.recipes.freelb import freelb as freelb
from advvl.recipes.lat import lat as lat
from advvl.recipes.lxmert_adv import lxmert_adv as lxmert_adv
from advvl.recipes.modality_interference import modality_interference as modality_interference
from advvl.recipes.neftune import neftune as neftune
from advvl.recipes.pgd import pgd as pgd
from advvl.recipes.pmg_aft import pmg_aft as pmg_aft
from advvl.recipes.r_drop import r_drop as r_drop
from advvl.recipes.sam import sam as sam
from advvl.recipes.smart import smart as smart
from advvl.recipes.tecoa import tecoa as tecoa
from advvl.recipes.trades import trades as trades
from advvl.recipes.vat import vat as vat
from advvl.recipes.villa import villa as villa
from advvl.recipes.villa_uniter import villa_uniter as villa_uniter
