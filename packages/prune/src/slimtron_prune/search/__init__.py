"""The best shape of a model for a budget."""
