"""Base models, LoRA adapters, and many adapters in one pass."""
