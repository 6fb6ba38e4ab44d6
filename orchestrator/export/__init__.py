"""timm folders and model cards."""
