"""SparseCoder: what every architecture shares, and all that the rest of fastsae knows of one."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import Self

from .. import _files
from .._config import make_plain
from .._errors import not_a_tensor
from .._memory import advise_huge_pages
from ..ops import _factors, sparse_decode
from ..optim import set_unit_norm
from .code import Code, Loss
from .description import Description
from .initial import geometric_median, normalize_rows_
from .origin import Origin

_FORMAT = "fastsae.SparseCoder"
_OLDER = {"fastsae.TopKSAE": "topk"}  # formats from before there was more than one architecture


@dataclass(frozen=True)
class CoderConfig:
    """Sizes and options that every architecture has; a subclass adds its own.

    Attributes:
        d_in: D_in, width of the activations that are encoded.
        d_sae: F, number of latents.
        d_out: D_out, width of what is reconstructed (a transcoder's differs); None means d_in.
        apply_b_dec_to_input: encode x - b_dec; otherwise x.
        normalize_decoder: rows of W_dec have norm 1; `FusedAdam` keeps them so.
        dead_after: training tokens without firing after which a latent counts as dead.
    """

    d_in: int
    d_sae: int
    _: KW_ONLY
    d_out: int | None = None
    apply_b_dec_to_input: bool = True
    normalize_decoder: bool = True
    dead_after: int = 10_000_000

    architecture: ClassVar[str]

    def __post_init__(self) -> None:
        make_plain(self)
        if self.d_in < 1 or self.d_sae < 1:
            self.refuse(f"d_in and d_sae must be positive, got {self.d_in} and {self.d_sae}")
        if self.d_out is not None and self.d_out < 1:
            self.refuse(f"d_out must be positive, got {self.d_out}")
        if self.apply_b_dec_to_input and self.d_out not in (None, self.d_in):
            self.refuse(
                f"apply_b_dec_to_input needs d_out = d_in, got {self.d_out} and {self.d_in}"
            )
        if self.dead_after < 1:
            self.refuse(f"dead_after must be positive, got {self.dead_after}")

    def refuse(self, why: str) -> None:
        """Raises ValueError in the architecture's name."""
        raise ValueError(f"{type(self).__name__}: {why}")


class SparseCoder(nn.Module, ABC):
    r"""Base of the sparse autoencoders and transcoders.

    A subclass has a `config_class` of its own and defines `reset_parameters`, `encode`, `loss` and
    `describe`; `fastsae.nn.ARCHITECTURES` lists it. Training, evaluation, files and steering know
    this class only.

    Parameters: W_enc [F, D_in], b_enc [F], W_dec [F, D_out], b_dec [D_out]; a subclass may add
    more. Buffers, for dead latents: tokens_seen [] and last_fired [F] int64, updated by `encode` in
    training mode only, once a batch also under activation checkpointing.

    Args:
        sizes, options: the fields of the class's `config_class`; or one such config.
        dtype, device: of the parameters; fp32 unless there is a reason.
        seed: of the initial directions; None draws from torch's global generator.

    A token's code and reconstruction do not depend on the other tokens of the call nor on the
    number of threads, to the bit.
    """

    config_class: ClassVar[type[CoderConfig]]
    config: CoderConfig
    origin: Origin | None = None  # the model and site it was trained on; saved with it
    tokens_seen: torch.Tensor
    last_fired: torch.Tensor

    def __init__(
        self,
        *sizes: Any,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = len(sizes) == 1 and not options and isinstance(sizes[0], CoderConfig)
        config: CoderConfig = sizes[0] if given else self.config_class(*sizes, **options)
        if type(config) is not self.config_class:
            raise TypeError(
                f"{type(self).__name__}: needs a {self.config_class.__name__}, got "
                f"{type(config).__name__}"
            )
        self.config = config
        self.d_in, self.d_sae = config.d_in, config.d_sae
        self.d_out = config.d_in if config.d_out is None else config.d_out
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(advise_huge_pages(torch.empty(self.d_sae, self.d_in, **like)))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae, **like))
        self.W_dec = nn.Parameter(advise_huge_pages(torch.empty(self.d_sae, self.d_out, **like)))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, **like))
        self.add_parameters(like)
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer(
            "last_fired", torch.zeros(self.d_sae, dtype=torch.int64, device=device)
        )
        if self.W_dec.device.type != "meta":
            self.reset_parameters(seed)

    def add_parameters(self, like: dict[str, Any]) -> None:
        """Parameters beyond the four, made with dtype and device of `like`."""

    def extra_repr(self) -> str:
        default = {f: getattr(type(self.config), f, None) for f in asdict(self.config)}
        return ", ".join(
            f"{name}={value!r}"
            for name, value in asdict(self.config).items()
            if value != default[name]
        )

    # -- what a subclass defines --------------------------------------------------------------

    @abstractmethod
    def reset_parameters(self, seed: int | None = None) -> None:
        """Fresh weights, in place. None draws from torch's global generator."""

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Code:
        """The active latents of every token of x [..., D_in], which is cast to W_enc's dtype.

        Implementations end with `return self._tracked(code)`.
        """

    @abstractmethod
    def loss(
        self, x: torch.Tensor, target: torch.Tensor | None = None, *, most_dead: int | None = None
    ) -> Loss:
        """What training minimises on a batch.

        Args:
            x: [..., D_in].
            target: [..., D_out] what is to be reconstructed; x when None.
            most_dead: at most so many latents are dead, when the caller knows; a GPU then need not
                be waited for, and a CUDA graph can hold the call.
        """

    @abstractmethod
    def describe(self) -> Description:
        """Weights and activation, as steering and other formats take them."""

    # -- the autoencoder ----------------------------------------------------------------------

    def decode(self, code: Code) -> torch.Tensor:
        """[..., D_out], the reconstruction from a code of any K."""
        return sparse_decode(code.values, code.indices, self.W_dec, self.b_dec)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The reconstruction [..., D_out] of x [..., D_in], in the parameters' dtype."""
        return self.decode(self.encode(x))

    def _input(self, x: torch.Tensor) -> torch.Tensor:
        """What the encoder's rows are multiplied with."""
        self._refuse_other_than_activations("x", x)
        if x.shape[-1:] != (self.d_in,):
            raise ValueError(
                f"{type(self).__name__}: x must be [..., {self.d_in}], got {list(x.shape)}"
            )
        if not torch.compiler.is_compiling():
            self._refuse_ddp()
        x = x.to(self.W_enc.dtype)
        # not x - b_dec: the same to the bit, but its backward negates a [N, D] gradient first
        return x + (-self.b_dec) if self.config.apply_b_dec_to_input else x

    def _refuse_other_than_activations(self, name: str, x: Any) -> None:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{type(self).__name__}: {name}: {not_a_tensor(x)}")
        if not x.is_floating_point():
            raise TypeError(
                f"{type(self).__name__}: {name} must be activations, of a floating dtype, got "
                f"{x.dtype}"
            )

    def _target(self, x: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
        if target is None:
            target = x
        if target.shape != (*x.shape[:-1], self.d_out):
            raise ValueError(
                f"{type(self).__name__}: target must be {[*x.shape[:-1], self.d_out]}, got "
                f"{list(target.shape)}"
            )
        return target

    def _refuse_ddp(self) -> None:
        if _factors.factors(self.W_enc) is not None and (
            torch.distributed.is_available()
            and DistributedDataParallel._get_active_ddp_module() is not None
        ):
            raise RuntimeError(
                f"{type(self).__name__}: FusedAdam keeps no gradients that DistributedDataParallel "
                "could reduce; train the bare module with FusedAdam(..., process_group=group), or "
                "keep DDP and use a torch optimizer"
            )

    # -- initialisation -----------------------------------------------------------------------

    @torch.no_grad()
    def initialize_from_data(
        self,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        directions: str = "data",
        seed: int | None = None,
    ) -> None:
        """Starts from a sample of activations instead of from random directions.

        b_dec becomes the geometric median of the target, decoder rows become directions of its
        points seen from there, encoder rows those of the same tokens' x (of an autoencoder, the
        same), with the one scale that reconstructs the sample best.

        Args:
            x: [..., D_in] a sample, some thousands of tokens or more. Points are repeated with
                noise when there are fewer than F.
            target: [..., D_out] of the same tokens; x when None.
            directions: "data", or "random" to keep the present rows and set only b_dec and the
                encoder's scale.
            seed: of the choice of points; None draws from torch's global generator.

        Raises:
            ValueError: the sample is empty, of another width, not finite, or `directions` unknown.
        """
        where = "initialize_from_data"
        self._refuse_other_than_activations("x", x)
        if directions not in ("data", "random"):
            raise ValueError(f"{where}: directions must be 'data' or 'random', got {directions!r}")
        if x.dim() < 1 or x.shape[-1] != self.d_in or x.numel() == 0:
            raise ValueError(
                f"{where}: x must be [..., {self.d_in}] and not empty, got {list(x.shape)}"
            )
        target = self._target(x, target).reshape(-1, self.d_out)
        x = x.reshape(-1, self.d_in)
        device, n = self.W_dec.device, x.shape[0]
        if seed is None:
            seed = int(torch.randint(1 << 62, ()))
        generator = torch.Generator(device).manual_seed(seed)
        some = torch.randperm(n, generator=generator, device=device)[:16384]

        def rows_of(points: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return points[at.to(points.device)].to(device=device, dtype=torch.float32)

        sample, wanted = rows_of(x, some), rows_of(target, some)
        if not (sample.isfinite().all() and wanted.isfinite().all()):
            raise ValueError(f"{where}: the data hold NaN or inf")
        same = target.data_ptr() == x.data_ptr() and self.d_in == self.d_out
        centre = geometric_median(wanted)
        self.b_dec.copy_(centre)
        if directions == "data":
            order = (
                torch.randperm(n, generator=generator, device=device) if self.d_sae <= n else None
            )
            for i in range(0, self.d_sae, 65536):  # no second copy of a large decoder
                rows = slice(i, min(i + 65536, self.d_sae))
                size = rows.stop - rows.start
                # a permutation while points last, so that no point is taken twice
                if order is not None:
                    at = order[rows]
                else:
                    at = torch.randint(n, (size,), generator=generator, device=device)
                points = rows_of(target, at) - centre
                if order is None:
                    spread = points.norm(dim=1, keepdim=True) / self.d_out**0.5
                    noise = torch.empty_like(points).normal_(generator=generator)
                    points += 0.3 * spread * noise
                self.W_dec[rows] = points.to(self.W_dec.dtype)
                if not same:
                    self.W_enc[rows] = rows_of(x, at).to(self.W_enc.dtype)
            normalize_rows_(self.W_dec, generator)
        self.b_enc.zero_()
        if same:
            self.W_enc.copy_(self.W_dec)
        else:
            normalize_rows_(self.W_enc, generator)
        mode = self.training
        self.eval()
        code = self.encode(sample)
        found = sparse_decode(code.values, code.indices, self.W_dec).float()
        self.train(mode)
        # argmin_s |target - b_dec - s found|^2; the selection does not depend on s
        scale = (found * (wanted - centre)).sum() / found.square().sum().clamp_min(1e-30)
        if scale.isfinite() and scale > 0:
            self.W_enc.mul_(scale)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scales the rows of W_dec to norm 1 (`FusedAdam` does it in its step)."""
        normalize_rows_(self.W_dec)

    # -- dead latents -------------------------------------------------------------------------

    @torch.no_grad()
    def _tracked(self, code: Code) -> Code:
        """Notes at which token count each latent last fired. O(N k), no host sync on a GPU."""
        if not self.training or _recomputing():
            return code
        values, indices = code.values.detach(), code.indices
        self.tokens_seen += indices.shape[:-1].numel()
        fired = torch.where(values != 0, self.tokens_seen, 0)
        self.last_fired.scatter_reduce_(0, indices.reshape(-1).long(), fired.reshape(-1), "amax")
        return code

    def tokens_since_fired(self) -> torch.Tensor:
        """[F] int64: training tokens since each latent last fired."""
        return self.tokens_seen - self.last_fired

    def dead_latents(self) -> torch.Tensor:
        """[M] int64, ascending: latents that did not fire in `config.dead_after` tokens."""
        return (self.tokens_since_fired() >= self.config.dead_after).nonzero().squeeze(1)

    # -- parameters ---------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, recorded factors included."""
        super().zero_grad(set_to_none)
        for param in self.parameters():
            recorded = _factors.factors(param)
            if recorded is not None:
                recorded.clear()

    # The unit-norm mark that FusedAdam reads is an attribute of the parameter object. New objects
    # come from assignment and load_state_dict(assign=True), deepcopy and unpickling, and `.to`.

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        super()._apply(*args, **kwargs)
        self._mark()
        return self

    def _mark(self) -> None:
        param = self._parameters.get("W_dec")
        if param is not None:
            set_unit_norm(param, self.config.normalize_decoder)

    # -- files --------------------------------------------------------------------------------

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes config.json and sae.safetensors, each atomically, into `directory`.

        Only the parameters; training state (dead latents, optimizer) belongs to `fastsae.train`.
        Parameters that are one tensor under two names (tied weights) are one when they are loaded.

        Raises:
            ValueError: two parameters share a part of their memory.
        """
        config = {"architecture": self.config.architecture, **asdict(self.config)}
        _files.save(
            directory,
            _FORMAT,
            {"config": config} | ({} if self.origin is None else {"origin": asdict(self.origin)}),
            dict(self.named_parameters(remove_duplicate=False)),
        )

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: str | torch.device = "cpu"
    ) -> Self:
        """Reads what `save_pretrained` wrote, in the dtype it was saved in, in eval mode.

        Of `SparseCoder` it reads any architecture, of a subclass that one only.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is truncated, foreign, inconsistent or of a future version, or holds
                another architecture; the message names the file and the reason.
        """
        from . import ARCHITECTURES

        header, tensors = _files.load(directory, (_FORMAT, *_OLDER), device)
        where = Path(directory) / _files.CONFIG
        config = header.get("config")
        if not isinstance(config, dict):
            raise ValueError(f"{where}: 'config' is missing")
        name = config.pop("architecture", _OLDER.get(header["format"]))
        found = ARCHITECTURES.get(name)
        if found is None:
            raise ValueError(
                f"{where}: architecture is {name!r}, this fastsae knows {', '.join(ARCHITECTURES)}"
            )
        if not issubclass(found, cls):
            raise ValueError(f"{where}: holds a {found.__name__}, not a {cls.__name__}")
        try:
            coder = found(found.config_class(**config), device="meta")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        where = Path(directory) / _files.WEIGHTS
        expected = {n: list(p.shape) for n, p in coder.named_parameters()}
        shapes = {n: list(t.shape) for n, t in tensors.items()}
        if shapes != expected:
            raise ValueError(f"{where}: tensors are {shapes}, config.json needs {expected}")
        one: dict[int, nn.Parameter] = {}
        for n, tensor in tensors.items():
            setattr(coder, n, one.setdefault(id(tensor), nn.Parameter(tensor)))
        origin = header.get("origin")
        if origin is not None:
            known = {f.name for f in fields(Origin)}
            strings = isinstance(origin, dict) and all(isinstance(v, str) for v in origin.values())
            if not strings:
                raise ValueError(f"{Path(directory) / _files.CONFIG}: 'origin' is damaged")
            coder.origin = Origin(**{k: v for k, v in origin.items() if k in known})
        coder.tokens_seen = torch.zeros((), dtype=torch.int64, device=device)
        coder.last_fired = torch.zeros(coder.d_sae, dtype=torch.int64, device=device)
        return coder.eval()


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: `torch.utils.checkpoint` doing it again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
