"""What layer-wise distillation gains on trained models, on data that they have not learned from."""
