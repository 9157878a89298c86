"""UNITER's tasks."""
