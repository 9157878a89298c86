"""UNITER's data: its databases, sources of batches for its tasks, and batches of data of your own."""
