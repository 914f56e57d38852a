"""The projection that ends a sublayer: what it is given are the neurons of an MLP, or the heads of attention."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

# Names that families give to it; where none is found, the last projection back to the stream's width is taken.
_MLP_NAMES = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "wo", "fc_out", "output_linear", "output_proj")
_ATTENTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "output_proj", "out_lin", "final_linear")


def widths(module: nn.Module) -> tuple[int, int] | None:
    """Widths in and out of a linear map (`Linear` and what is like it, GPT-2's `Conv1D`); None for any other module."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        found = [getattr(module, name, None) for name in names]
        if all(isinstance(width, int) for width in found):
            return int(found[0]), int(found[1])  # type: ignore[arg-type]  # both found
    return None


def down_projection(model: nn.Module, path: str, d_model: int) -> nn.Module | None:
    """The projection that ends the dense MLP at `path`; None where it cannot be told.

    Where `path` names a projection itself, as in OPT, whose blocks hold the two maps of the MLP without a module around
    them, its neighbours are looked at.
    """
    module = model.get_submodule(path)
    if widths(module) is not None:
        return _last(model.get_submodule(path.rpartition(".")[0]).named_children(), d_model, _MLP_NAMES)
    return _last(module.named_modules(), d_model, _MLP_NAMES)


def output_projection(attention: nn.Module, d_model: int) -> nn.Module | None:
    """The projection that ends an attention module; None where it cannot be told."""
    found = [*attention.named_children()]
    found += [(name.rsplit(".", 1)[-1], m) for name, m in attention.named_modules() if "." in name]
    return _last(iter(found), d_model, _ATTENTION_NAMES, only_named=True)


def _last(
    children: Iterator[tuple[str, nn.Module]], d_model: int, names: tuple[str, ...], *, only_named: bool = False
) -> nn.Module | None:
    fitting = {
        path.rsplit(".", 1)[-1]: module
        for path, module in children
        if (size := widths(module)) is not None and size[1] == d_model
    }
    for name in names:
        if name in fitting:
            return fitting[name]
    if only_named:
        return None
    narrowing = [m for m in fitting.values() if (size := widths(m)) is not None and size[0] != d_model]
    return narrowing[-1] if narrowing else None
