"""Pictures, and estimates from compiled programs."""
