"""Training of sparse coders. Text and activations are submodules of their own."""

from .trainer import TrainConfig, Trainer, train_sae

__all__ = ["TrainConfig", "Trainer", "train_sae"]
