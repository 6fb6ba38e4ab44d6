"""Ray actors, placement, cluster connection."""
