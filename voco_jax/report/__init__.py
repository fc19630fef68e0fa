"""Pictures of crops, positions and caches."""
