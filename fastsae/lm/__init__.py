"""Language models: loading, sites, text, activations. Importing this costs nothing."""
