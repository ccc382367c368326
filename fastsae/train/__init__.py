"""Training: text, activations, evaluation. Import the submodules; importing this costs nothing."""
