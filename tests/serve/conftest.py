"""A service of the embedded model with random latents, and a server and client of it."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An SAE for the embedded model; random latents, each a large step at 1 x max."""
    from fastsae.nn import TopKSAE
    from fastsae.nn.description import MAX_ACTIVATION
    from fastsae.steer import MaxActivations

    where = tmp_path_factory.mktemp("serve") / "sae"
    TopKSAE(256, 64, 4, seed=0).save_pretrained(where)
    MaxActivations(torch.full((64,), 30.0), 1000, "made up", site="transformer.h.2").save(
        where / MAX_ACTIVATION
    )
    return where


@pytest.fixture(scope="module")
def service(folder):
    from serving import LIMITS

    from fastsae.cli.serve import load_service
    from fastsae.cli.subject import load_saved

    made = load_service(load_saved(folder, None, None, None, "cpu", False), LIMITS)
    yield made
    made.engine.close()


@pytest.fixture(scope="module")
def server(service):
    from serving import Server

    made = Server(service)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
