"""Training of sparse coders, on activations from anywhere (`fastsae.lm.harvest` has those of a language model)."""

from .trainer import TrainConfig, Trainer, train_sae

__all__ = ["TrainConfig", "Trainer", "train_sae"]
