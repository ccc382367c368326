"""The main job: train an SAE on a language model, read its latents, steer with one, show it all.

`settings` and `pipeline` run it, `steering` chooses a latent and a strength, `page` and `charts`
write the HTML page. Needs the `cli` extra; `fastsae` itself never imports this package.
"""
