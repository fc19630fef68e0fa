"""Segmentations: made by a network, compared with references, measured and drawn."""
