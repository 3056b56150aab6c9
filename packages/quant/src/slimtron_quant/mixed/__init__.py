"""Mixed precision: a format for each layer, so that the whole model fits a budget."""
