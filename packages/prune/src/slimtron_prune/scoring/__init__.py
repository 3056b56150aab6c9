"""How much every layer, head, channel and expert matters to a model on a text."""
