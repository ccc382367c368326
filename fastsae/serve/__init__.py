"""A steered language model behind HTTP: a chat page and an OpenAI-compatible API.

`engine.py` generates for all visitors in one batch, `protocol.py` says what a request may be,
`app.py` is the application, `page.py` the page's part of it; what the page shows of latents comes
from `latents.py`. Needs the `serve` extra.
"""
