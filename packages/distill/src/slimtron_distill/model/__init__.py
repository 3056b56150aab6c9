"""Student and teacher as one model for Megatron's schedules."""
