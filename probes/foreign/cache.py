"""`run_with_cache`: one forward pass and every tensor at its sites, in the manner of TransformerLens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float

from moescope.core.errors import InputError
from moescope.core.site_names import read_site
from moescope.core.sites import EXPERT_INDICES, EXPERT_OUT, EXPERT_POST, EXPERT_WEIGHTS, PATTERN, ROUTER_LOGITS, Site
from moescope.probes.anatomy import Anatomy
from moescope.probes.forward import DeviceBatch, logits_of
from moescope.probes.live_model import LiveModel
from moescope.probes.taps import sites_of, tapped

Text = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor
Name = str | tuple[str, int] | tuple[str, int, str]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

# What a site's tensor is called where taps hand it over; elsewhere it comes alone.
_NAMES = {
    EXPERT_INDICES: "indices",
    EXPERT_WEIGHTS: "weights",
    EXPERT_OUT: "out",
    EXPERT_POST: "post",
    ROUTER_LOGITS: "logits",
}


class NotCachedError(InputError, KeyError):
    """A site that is not in a cache."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class SiteCache(Mapping[str, torch.Tensor]):
    """Tensors of one forward pass by the names of their sites; every spelling that `read_site` takes finds them.

    Attributes:
        mask: [batch, position], real tokens. Rows of padding are in the tensors, as in TransformerLens.

    Example:
        >>> import moescope as ms
        >>> from moescope.probes.foreign.cache import run_with_cache
        >>> logits, cache = run_with_cache(ms.load("demo"), [[5, 6, 7]], names_filter="router_logits.0")
        >>> cache["blocks.0.mlp.hook_router_logits"].shape == cache["router_logits", 0].shape
        True
    """

    def __init__(
        self, tensors: Mapping[Site, torch.Tensor], anatomy: Anatomy, mask: Bool[torch.Tensor, "batch position"]
    ) -> None:
        self._tensors = {site: tensors[site] for site in sorted(tensors)}
        self._anatomy, self.mask = anatomy, mask

    @property
    def sites(self) -> list[Site]:
        """The sites that were cached, by layer."""
        return list(self._tensors)

    def __getitem__(self, name: Name | Site) -> torch.Tensor:
        site = read_site(name, self._anatomy)
        if site not in self._tensors:
            raise NotCachedError(
                f"{site} is not in this cache",
                expected=f"one of {len(self)} sites, for instance {next(iter(self), 'none')}",
                fix="name it in names_filter" if site.tensor == PATTERN else None,
            )
        return self._tensors[site]

    def __contains__(self, name: object) -> bool:
        try:
            return isinstance(name, (str, tuple, Site)) and read_site(name, self._anatomy) in self._tensors
        except InputError:
            return False

    def __iter__(self) -> Iterator[str]:
        return map(str, self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        rows, positions = self.mask.shape
        return f"SiteCache({len(self)} sites, batch {rows}, {positions} positions)"

    def to(self, device: str | torch.device) -> SiteCache:
        """The same tensors on another device."""
        moved = {site: tensor.to(device) for site, tensor in self._tensors.items()}
        return SiteCache(moved, self._anatomy, self.mask.to(device))


def run_with_cache(
    model: LiveModel, text: Text, names_filter: NamesFilter = None
) -> tuple[Float[torch.Tensor, "batch position vocabulary"], SiteCache]:
    """Run a model once and keep its tensors at every site, as TransformerLens' `run_with_cache` does.

    Args:
        model: any live model.
        text: a text or several, with the special tokens that the tokenizer adds; or token ids, one row or several. Rows of
            different lengths are padded at the right.
        names_filter: which sites: one name or several, in any spelling, or a function of the stored name. None for all but
            attention patterns, whose size grows with the square of the length.

    Returns:
        Logits, and the cache: tensors [batch, position, …], at `hook_pattern` [batch, head, query, key], detached from the
        graph and copied, so that they stay as the model saw them. Neurons of slots that no expert computed are 0.

    Raises:
        InputError: a name that is no site of this model; a text without a tokenizer; no tokens.
    """
    batch = _batch(model, text)
    sites = _chosen(model, names_filter)
    seen: dict[Site, torch.Tensor] = {}
    shape = tuple(batch.ids.shape)

    def receive(site: Site, tensors: dict[str, torch.Tensor]) -> None:
        seen[site] = _by_position(site, tensors, shape).detach().clone()

    with tapped(model.module, model.anatomy, sites, receive):
        logits = logits_of(model, batch)
    return logits, SiteCache(seen, model.anatomy, batch.mask)


def _by_position(site: Site, tensors: Mapping[str, torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of a site as [batch, position, …]."""
    tensor = tensors[_NAMES[site.tensor]] if site.tensor in _NAMES else next(iter(tensors.values()))
    if site.tensor == EXPERT_POST:
        k = tensors["indices"].shape[-1]
        slots = tensor.new_zeros(tensors["indices"].numel(), tensor.shape[-1]).index_copy(0, tensors["slot"], tensor)
        return slots.reshape(*shape, k, -1)
    flat = site.tensor in _NAMES or tensor.ndim == 2  # a shared expert gives either
    return tensor.reshape(*shape, *tensor.shape[1:]) if flat else tensor


def _chosen(model: LiveModel, names_filter: NamesFilter) -> list[Site]:
    known = sites_of(model.module, model.anatomy)
    if names_filter is None:
        return [site for site in known if site.tensor != PATTERN]
    if callable(names_filter):
        return [site for site in known if names_filter(str(site))]
    names = [names_filter] if isinstance(names_filter, str) else names_filter
    return list(dict.fromkeys(read_site(name, model.anatomy) for name in names))


def _batch(model: LiveModel, text: Text) -> DeviceBatch:
    rows = _rows(model, text)
    if not rows or not all(rows):
        raise InputError("there are no tokens to run", found="an empty text" if rows else "no text")
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), model.pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    if int(ids.max()) >= model.anatomy.vocabulary or int(ids.min()) < 0:
        raise InputError(
            "a token id that the model does not have",
            expected=f"ids from 0 to {model.anatomy.vocabulary - 1:,}",
            found=f"{int(ids.min()):,} to {int(ids.max()):,}",
        )
    return DeviceBatch(ids.to(model.device), mask.to(model.device))


def _rows(model: LiveModel, text: Any) -> list[list[int]]:
    """Token ids of each row."""
    if isinstance(text, torch.Tensor):
        text = text.tolist()
    if isinstance(text, str):
        text = [text]
    if text and isinstance(text[0], str):
        if model.tokenizer is None:
            raise InputError(f"{model.name} has no tokenizer", fix="pass token ids, or tokenizer=… to load")
        return [list(ids) for ids in model.tokenizer(list(text))["input_ids"]]
    return [[int(i) for i in text]] if text and isinstance(text[0], int) else [list(map(int, row)) for row in text]
