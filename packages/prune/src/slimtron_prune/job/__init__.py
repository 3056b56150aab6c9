"""A pruning job: one model on disk to a smaller one, proved before and after."""
