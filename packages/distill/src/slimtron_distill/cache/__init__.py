"""The teacher's largest logits, computed once and kept on disk."""
