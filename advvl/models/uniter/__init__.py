"""UNITER on transformers' BERT layers."""

from advvl.models.uniter.config import UniterConfig as UniterConfig
from advvl.models.uniter.layout import gather_index as gather_index
from advvl.models.uniter.layout import region_mask as region_mask
from advvl.models.uniter.layout import text_mask as text_mask
from advvl.models.uniter.model import UniterModel as UniterModel
from advvl.models.uniter.model import UniterOutput as UniterOutput
