"""The whole job, from two checkpoints to a verified student with its report."""
