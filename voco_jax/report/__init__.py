"""Pictures of crops, positions and whole caches."""
