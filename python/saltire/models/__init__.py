"""Models: what Saltire knows of architectures, loading, saving, the default model."""

from saltire.models.adapters import supported_architectures
from saltire.models.default import default_model_path
from saltire.models.loading import load_model
from saltire.models.saving import save_checkpoint

__all__ = ["default_model_path", "load_model", "save_checkpoint", "supported_architectures"]
