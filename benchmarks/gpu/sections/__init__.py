"""The benchmarks of the check, one file a section; each has `run(setting)`, which adds its rows as it finds them."""
