"""UNITER's tasks."""

from advvl.tasks.uniter.nlvr2 import UniterForNLVR2 as UniterForNLVR2
from advvl.tasks.uniter.pretraining import UniterForPretraining as UniterForPretraining
from advvl.tasks.uniter.referring import UniterForReferringExpressions as UniterForReferringExpressions
from advvl.tasks.uniter.retrieval import UniterForRetrieval as UniterForRetrieval
from advvl.tasks.uniter.vcr import UniterForVCR as UniterForVCR
from advvl.tasks.uniter.vcr import UniterForVCRPretraining as UniterForVCRPretraining
from advvl.tasks.uniter.ve import UniterForVE as UniterForVE
from advvl.tasks.uniter.vqa import UniterForVQA as UniterForVQA
