"""Training of sparse coders; `fastsae.lm.harvest` has the activations of a language model."""

from .trainer import TrainConfig, Trainer, train_sae

__all__ = ["TrainConfig", "Trainer", "train_sae"]
