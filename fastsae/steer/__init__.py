"""Steering a language model with an SAE."""
