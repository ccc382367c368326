"""The latents as the page shows them: labels, a search, cards, those that fire on a text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import torch

from ..nn import Description
from .reading import Reader, fired
from .report import Report
from .words import WORD, Words, shown

_LABEL = 6  # words of a label
_LOOKED_AT = (64, 1024)  # tokens that they are chosen from; more where few can be read
_CARD = 10  # tokens at either end that a card shows
_STRONG = 0.4  # of the strongest effect on a word: a latent that promotes it
_SAMPLED = 4096  # latents that the clearest labels are looked for among
_WORK = 1 << 34  # multiplications for that
_PER_TOKEN = 16  # latents of a token of a prompt
_LISTED = 40  # latents of a prompt


class Latents:
    """What is known of an SAE's latents.

    A label is made of the tokens that the decoder row promotes most, for every latent in the same
    way.

    Args:
        readout: [D, V], what each dimension of the site adds to the logits. Without it labels are
            known of the report's latents only.
        report: of the quickstart that made the SAE.
        reader: runs the model up to the site; None: it cannot be run beside the one that writes.
        prompt: to begin with.
    """

    def __init__(
        self,
        tokenizer: Any,
        sae: Description,
        readout: torch.Tensor | None = None,
        report: Report | None = None,
        reader: Reader | None = None,
        prompt: str = "The",
    ) -> None:
        self.sae, self.words = sae, Words(tokenizer)
        self._readout = None if readout is None else readout.to(sae.W_dec.dtype)
        self._report, self._reader, self._prompt = report or Report(), reader, prompt

    def __len__(self) -> int:
        return len(self.sae.W_dec)

    @property
    def has_max(self) -> bool:
        return self.sae.max_activation is not None

    # -- what is listed ---------------------------------------------------------------------------

    def listed(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Number, label and maximum of some; those that the SAE does not have are left out."""
        known = [j for j in dict.fromkeys(numbers) if 0 <= j < len(self)]
        return [
            {"latent": j, "words": words, "max": self._maximum(j)}
            for j, words in zip(known, self._labels(known), strict=True)
        ]

    def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        """By numbers, or by words: latents that promote all of them come first, each with the
        tokens that it was found by. Without a query the report's, then those of clear labels."""
        words = query.split()
        if words and all(w.isdecimal() and len(w) < 10 for w in words):
            return self.listed([int(w) for w in words])[:limit]
        if not words:
            first = list(dict.fromkeys([*self._report.latents, *self._clearest]))
            return self.listed(first[:limit])
        found: dict[int, list[tuple[str, float]]] = {}
        for word in dict.fromkeys(words):
            for latent, text, strength in self._with_word(word, 4 * limit):
                found.setdefault(latent, []).append((text, strength))
        order = sorted(found, key=lambda j: (-len(found[j]), -sum(s for _, s in found[j]), j))
        return [
            {**one, "found": [text for text, _ in found[one["latent"]]]}
            for one in self.listed(order[:limit])
        ]

    def _with_word(self, word: str, most: int) -> list[tuple[int, str, float]]:
        """Latents that a word finds, the token of theirs that it is, and how well it does, in
        [0, 1]."""
        found: dict[int, tuple[str, float]] = {}
        tokens = self.words.looked_for(word)
        if self._readout is not None and tokens:
            effect = self.sae.W_dec @ self._readout[:, tokens]
            best, at = effect.max(1)
            strength, latents = best.topk(min(most, len(best)))
            largest = float(strength[0])
            if largest > 0:
                for j, s in zip(latents.tolist(), (strength / largest).tolist(), strict=True):
                    if s >= _STRONG:
                        found[j] = shown(self.words[tokens[int(at[j])]]), s
        for j, known in self._report.latents.items():
            for text in (*known.fires_on, *known.promotes):
                if j not in found and word.casefold() in text.casefold():
                    found[j] = shown(text), len(word) / len(text)
        return [(j, text, s) for j, (text, s) in found.items()]

    def _labels(self, latents: Sequence[int]) -> list[list[str]]:
        if self._readout is None:
            known = [self._report.latents.get(j) for j in latents]
            return [[] if k is None else self.words.label(k.promotes, _LABEL) for k in known]
        labels: list[list[str]] = []
        for effect in self.sae.W_dec[list(latents)] @ self._readout:
            label: list[str] = []
            for most in _LOOKED_AT:
                if len(label) < _LABEL:
                    tokens = effect.topk(min(most, len(effect))).indices.tolist()
                    label = self.words.label((self.words[t] for t in tokens), _LABEL)
            labels.append(label)
        return labels

    def _maximum(self, latent: int) -> float | None:
        largest = self.sae.max_activation
        return None if largest is None else round(float(largest.values[latent]), 4)

    @cached_property
    def _clearest(self) -> list[int]:
        """Latents by how far the words that they promote most stand out from all tokens; of a large
        SAE a sample, and none that the statistics have not seen fire."""
        if self._readout is None:
            return list(range(min(len(self), _SAMPLED)))
        most = max(64, min(_SAMPLED, _WORK // self._readout.numel()))
        sample = torch.arange(0, len(self), max(1, -(-len(self) // most)))
        if self.sae.max_activation is not None:
            sample = sample[self.sae.max_activation.values[sample].cpu() > 0]
        scored: list[tuple[float, int]] = []
        for rows in sample.split(256):
            effect = self.sae.W_dec[rows.to(self.sae.W_dec.device)] @ self._readout
            best, tokens = effect.topk(min(_LABEL, effect.shape[1]), dim=1)
            height = best / effect.std(1, keepdim=True)
            for j, heights, ids in zip(
                rows.tolist(), height.tolist(), tokens.tolist(), strict=True
            ):
                texts = [self.words[t] for t in ids]
                says = [self.words.kind(t) == WORD and sum(map(str.isalpha, t)) > 2 for t in texts]
                scored.append((sum(h for h, s in zip(heights, says, strict=True) if s), j))
        return [j for _, j in sorted(scored, key=lambda s: (-s[0], s[1]))]

    # -- one latent -------------------------------------------------------------------------------

    def card(self, latent: int) -> dict[str, Any]:
        """All that is shown of one."""
        card = self.listed([latent])[0]
        if self._readout is not None:
            effect = self.sae.W_dec[latent] @ self._readout
            card["promotes"] = self._readable(effect)
            card["suppresses"] = [(text, -v) for text, v in self._readable(-effect)]
        known = self._report.latents.get(latent)
        if known is not None:
            readable = [t for t in known.fires_on if self.words.kind(t) is not None]
            card["fires_on"] = [shown(t) for t in readable]
            card["density"] = known.density
            card["examples"] = known.examples
        return card

    def _readable(self, effect: torch.Tensor) -> list[tuple[str, float]]:
        """The tokens of the largest values that can be read, pieces of words too."""
        best = effect.topk(min(_LOOKED_AT[-1], len(effect)))
        texts = (self.words[t] for t in best.indices.tolist())
        pairs = zip(texts, best.values.tolist(), strict=True)
        readable = ((shown(t), round(v, 3)) for t, v in pairs if self.words.kind(t) is not None)
        return list(islice(readable, _CARD))

    # -- a text -----------------------------------------------------------------------------------

    def on_text(self, ids: Sequence[int], first: int) -> dict[str, Any]:
        """The tokens from `first` on, the strongest latents of each with their activations, and
        those that come closest to their maximum anywhere in the text.

        Raises:
            NotImplementedError: the model cannot be run for this, or the SAE does not fit.
            ValueError: the site puts out something else than rows for tokens.
        """
        if self._reader is None:
            raise NotImplementedError("the model cannot be run beside the one that writes")
        found = fired(self.sae, self._reader(ids)[first:], _PER_TOKEN)
        values, latents = found.values.cpu(), found.latents.cpu()
        level = values
        if self.sae.max_activation is not None:
            level = values / self.sae.max_activation.values.cpu()[latents].clamp(min=1e-6)
        # a first token has activations of another size than all others
        skipped = 1 if first == 0 and len(values) > 1 else 0
        peaks = torch.zeros(len(self))
        peaks.scatter_reduce_(0, latents[skipped:].flatten(), level[skipped:].flatten(), "amax")
        listed = [j for j in peaks.topk(min(_LISTED, len(self))).indices.tolist() if peaks[j] > 0]
        return {
            "tokens": [shown(t) for t in self.words.pieces(list(ids[first:]))],
            "fired": [
                [(j, round(v, 3)) for j, v in zip(row, row_values, strict=True) if v > 0]
                for row, row_values in zip(latents.tolist(), values.tolist(), strict=True)
            ],
            "fires": found.fires.tolist(),
            "latents": self.listed(listed),
        }

    # -- to begin with ----------------------------------------------------------------------------

    def example(self) -> dict[str, Any]:
        """A prompt, and an edit that shows in what is written."""
        report = self._report
        if report.steered is not None and report.steered < len(self):
            latent, strength = report.steered, report.strength
        else:
            latent, strength = next(iter([*report.latents, *self._clearest, 0])), 2.0
        edit = {"latent": latent, "op": "clamp", "value": strength, "unit": "max"}
        if not self.has_max:
            edit |= {"value": self.step, "unit": "raw"}
        return {"prompt": self._prompt, "steer": [edit]}

    @cached_property
    def step(self) -> float:
        """An amount that shows, where no maximum is known: a third of the activations' length."""
        ids = self.words.encode(self._prompt, bos=True)
        if self._reader is None or not ids:
            return 10.0
        length = self._reader(ids)[1:].float().norm(dim=1)
        row = self.sae.W_dec.float().norm(dim=1).mean() / self.sae.input_scale
        return float(f"{float(length.mean() / row) / 3:.2g}") if len(length) else 10.0
