"""Models: one folder per family, with its layout, checkpoints and adapter."""
