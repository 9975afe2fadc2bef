"""Trees grown level by level from a model's logits."""
