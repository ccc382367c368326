"""Statistics of latents, their top examples, and which of them a reader can name."""
