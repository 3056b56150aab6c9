"""Finding the scales: run text through the model, check what came out, keep it."""
