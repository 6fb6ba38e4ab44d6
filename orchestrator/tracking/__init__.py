"""The only code that speaks MLflow."""
