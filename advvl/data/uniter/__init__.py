"""UNITER's data."""
