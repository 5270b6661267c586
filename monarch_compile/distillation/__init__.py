"""Layer-wise distillation: lowered sites learn to give what the exact form gives."""
