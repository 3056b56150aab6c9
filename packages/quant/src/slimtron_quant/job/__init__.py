"""The whole job, from a checkpoint to a verified export with its report."""
