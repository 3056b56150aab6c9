"""Training by Megatron-Core's own schedules, optimizer and checkpoints."""
