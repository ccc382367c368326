"""`fastsae serve`: a steered model behind a local page and an OpenAI-compatible API."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import typer

from . import fail, fail_missing
from .subject import ANY_MODEL, MODEL, SAE, Saved, load_saved

if TYPE_CHECKING:
    from ..serve.protocol import Limits
    from ..serve.service import Service

_LOCAL = ("127.0.0.1", "localhost", "::1")
_TOKEN = "FASTSAE_SERVE_TOKEN"
_READOUT = 1 << 28  # elements up to which latents are described by what they promote
# of the page, to begin with: the embedded model knows Python
_PYTHON = "def read(path):\n    with open(path) as file:"
_ENGLISH = "The first thing that I noticed was"


def serve(
    sae: Path = SAE,
    model: str | None = MODEL,
    layer: int | None = typer.Option(None, help="Block whose output is edited, from 0."),
    hook: str | None = typer.Option(None, help="Dotted path of a module instead of --layer."),
    device: str = typer.Option("cpu", help="Torch device."),
    any_model: bool = ANY_MODEL,
    host: str = typer.Option("127.0.0.1", help="Address to listen on; others can then reach it."),
    port: int = typer.Option(8000, min=0, max=65535),
    token: str | None = typer.Option(
        None, envvar=_TOKEN, help="Bearer token that every request must bring."
    ),
    rows: int = typer.Option(32, min=1, max=1024, help="Sequences generated at a time."),
    waiting: int = typer.Option(512, min=0, help="Sequences that may wait for a place."),
    prompt_tokens: int = typer.Option(1024, min=1, help="Longest prompt."),
    new_tokens: int = typer.Option(512, min=1, help="Most tokens a sequence may have written."),
    seconds: float = typer.Option(120.0, min=0.1, help="Time limit of a sequence."),
    steer: str | None = typer.Option(
        None, help="Edits in JSON, as in `steer` of a request, for requests of /v1 without any."
    ),
) -> None:
    """Serve the model with its latents on sliders: a chat page, and /v1 for OpenAI clients.

    Ends with status 1 when the device is lost (an illegal access, say): every request gets its
    answer first, and another process is needed.
    """
    try:
        import rich  # noqa: F401
        import transformers  # noqa: F401
        import uvicorn

        from ..serve.app import create_app
        from ..serve.connections import Impatient
        from ..serve.guard import LOOPBACK
        from ..serve.protocol import Limits, read_program
        from ..serve.service import RefusedError
    except ImportError as error:
        fail_missing(error)
    if token is None and _TOKEN in os.environ:  # typer takes an empty variable for none
        fail(f"{_TOKEN} is set and empty: unset it to serve without a token")
    if token is not None and not (token and all("!" <= c <= "~" for c in token)):
        fail("--token must be printable ASCII without spaces")
    try:
        edits = None if steer is None else read_program(steer)
    except ValueError as error:
        fail(f"--steer: {error}")
    listening = bound(host, port)
    port = listening.getsockname()[1]
    limits = Limits(
        rows=rows, waiting=waiting, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        seconds=seconds,
    )  # fmt: skip
    service = load_service(load_saved(sae, model, layer, hook, device, any_model), limits)
    service.steer = edits
    try:
        service.program(edits)
    except RefusedError as error:
        service.engine.close()
        fail(f"--steer: {str(error).removeprefix('steer: ')}")
    local = host in _LOCAL
    app = create_app(service, token=token, hosts=LOOPBACK if local else None)
    if not local and token is None:
        typer.echo(f"anyone who reaches {host} can use this server: --token limits that", err=True)
    typer.echo(f"{service.name} at {address(host, port, '/', token)}")
    if edits:
        typer.echo(f"requests of /v1 without a steer field: {steer}")
    typer.echo(f"OpenAI clients: base_url {address(host, port, '/v1')}   (stop with Ctrl+C)")

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            """Ends what is being written first: a stream would hold the server up."""
            threading.Thread(target=service.engine.close).start()
            super().handle_exit(sig, frame)

    server = Server(
        uvicorn.Config(
            app, host=host, port=port, http=Impatient, log_level="warning", timeout_keep_alive=10,
            timeout_graceful_shutdown=10,
        )
    )  # fmt: skip
    # every request has had its answer by then; whoever supervises this process starts another
    service.engine.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[listening])
    service.engine.close()
    if service.engine.failure is not None:
        typer.echo(f"the model cannot run any more: {service.engine.failure}", err=True)
        raise typer.Exit(1)


def bound(host: str, port: int) -> socket.socket:
    """A listening socket of this address, or the end: before a model is loaded or anything said."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(2048)
    except OSError as error:
        fail(f"cannot listen on {host}, port {port}: {error.strerror or error}")
    return listening


def address(host: str, port: int, path: str, token: str | None = None) -> str:
    """What to open; the token in the fragment, which a browser sends to nobody."""
    name = "localhost" if host in _LOCAL else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}{path}" + (f"#token={quote(token, safe='')}" if token else "")


def load_service(saved: Saved, limits: Limits) -> Service:
    """Model, SAE and engine, ready to serve."""
    import torch

    from ..lm.load import EMBEDDED_MODEL
    from ..lm.readout import logit_effect
    from ..serve.engine import Engine
    from ..serve.latents import Latents
    from ..serve.protocol import MAX_OPS
    from ..serve.reading import Reader
    from ..serve.report import read_report
    from ..serve.service import Service, model_id
    from ..steer import attach, describe

    trained, device = saved.sae, saved.device
    try:
        subject = saved.load_model()
        sae = describe(trained, saved.statistics)
        width = len(trained.W_dec[0])
        reader = None
        with contextlib.suppress(Exception):  # of modules that cannot be copied: the page says so
            reader = Reader(subject.model, subject.site)
        steerer = attach(
            subject.model, sae, hook=subject.site, max_slots=limits.rows, max_ops=2 * MAX_OPS,
            max_batch=limits.rows,
        )  # fmt: skip
    except (ValueError, NotImplementedError) as error:
        fail(str(error))
    config: Any = subject.model.config.get_text_config()
    eos = subject.model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if subject.tokenizer.eos_token_id is not None:
        ends = [*ends, subject.tokenizer.eos_token_id]
    engine = Engine(subject.model, steerer, ends, limits.rows, limits.waiting)
    try:
        engine.rehearse()
    except NotImplementedError as error:
        engine.close()
        fail(str(error))
    readout = None
    if config.vocab_size * width <= _READOUT:
        with torch.no_grad(), contextlib.suppress(NotImplementedError):  # then there are no words
            readout = logit_effect(
                subject.model, torch.eye(width, dtype=torch.float32, device=device)
            )
    report = read_report(saved.folder.parent / "report.json", len(trained.W_dec))
    embedded = EMBEDDED_MODEL.name in subject.name
    prompt = _PYTHON if embedded else report.prompt or _ENGLISH
    return Service(
        subject.name,
        subject.tokenizer,
        engine,
        Latents(subject.tokenizer, sae, readout, report, reader, prompt),
        limits,
        int(getattr(config, "max_position_embeddings", 1 << 30)),
        subject.site,
        model_id(subject.origin.model),
    )
