"""One checked run: settings resolved against backbone and data, its output directory, trained to its end."""
