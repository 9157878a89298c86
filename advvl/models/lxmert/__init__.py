"""Transformers' LXMERT: its batches, its checkpoints and its sites."""
