"""A steered language model behind HTTP: a chat page and an OpenAI-compatible API.

`engine.py` generates for all visitors in one batch, `protocol.py` says what a request may be,
`app.py` is the application. Needs the `serve` extra.
"""
