"""Experiments: the commands that a person runs."""
