"""What the user asks for: `TrainConfig`, read from YAML files, flags and `Config`."""

from training_framework.config.loading import build_config, config_to_yaml, load_config
from training_framework.config.schema import TrainConfig

__all__ = ["TrainConfig", "build_config", "config_to_yaml", "load_config"]
