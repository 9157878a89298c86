"""The sources of batches for UNITER's tasks, from its databases: one task per file."""
