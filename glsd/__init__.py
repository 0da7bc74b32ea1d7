"""glsd: global and local self-distillation of Vision Transformers, and retrieval fine-tuning on top of it."""

__version__ = "0.1.0"
