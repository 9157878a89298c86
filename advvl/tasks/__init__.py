"""Tasks: inputs, head and loss, one file per task; metrics and losses that several share."""
