"""Questions and captions about scenes of scanned digits, made from a seed."""
