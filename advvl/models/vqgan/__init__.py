"""VQGAN: images as a grid of codes, and back."""
