"""Evaluation: worst-case robustness, statistics and the report."""
