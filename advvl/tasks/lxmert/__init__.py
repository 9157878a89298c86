"""LXMERT's tasks."""

from advvl.tasks.lxmert.nlvr2 import LxmertForNLVR2 as LxmertForNLVR2
from advvl.tasks.lxmert.vqa import LxmertForVQA as LxmertForVQA
