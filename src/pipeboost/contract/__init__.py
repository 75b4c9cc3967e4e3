"""What the features share: the call, the model as they see it, the family it belongs to."""
