"""What an autoencoder is judged beside: other ways to write a vector with as few numbers, and with none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float

from moescope.sae.autoencoder import Autoencoder

Rows = Float[torch.Tensor, "*row component"]
_FITTED = 4096  # vectors that one number, a scale, is fitted on
_ELEMENTS = 1 << 24  # latents of so many rows at a time are held


class Reconstruction:
    """A way to write vectors again.

    Attributes:
        name: the condition under which its measures are stored.
    """

    name = ""

    def reconstruct(self, x: Rows) -> Rows:
        """The vectors again, in float32; for a transcoder, what it predicts from them."""
        raise NotImplementedError


class Own(Reconstruction):
    """The autoencoder itself."""

    name = "sae"

    def __init__(self, autoencoder: Autoencoder) -> None:
        self.autoencoder = autoencoder

    def reconstruct(self, x: Rows) -> Rows:
        """Encoded and decoded."""
        given = x.to(self.autoencoder.device)
        return self.autoencoder.decode(self.autoencoder.encode(given), given).to(x.device)


class Shuffled(Own):
    """The autoencoder with its decoder rows dealt out anew: each latent, as active as it is, writes another latent's row."""

    name = "shuffled"

    def __init__(self, autoencoder: Autoencoder, generator: torch.Generator) -> None:
        super().__init__(autoencoder)
        self.order = torch.randperm(autoencoder.d_sae, generator=generator).to(autoencoder.device)

    def reconstruct(self, x: Rows) -> Rows:
        """Encoded, exchanged among latents, and decoded."""
        given = x.to(self.autoencoder.device)
        return self.autoencoder.decode(self.autoencoder.encode(given)[..., self.order], given).to(x.device)


class Zero(Reconstruction):
    """Nothing: the vector 0."""

    name = "zero"

    def __init__(self, width: int) -> None:
        self.width = width

    def reconstruct(self, x: Rows) -> Rows:
        """Zeros."""
        return torch.zeros(*x.shape[:-1], self.width, device=x.device)


class Mean(Reconstruction):
    """The mean of the vectors that were fitted on."""

    name = "mean"

    def __init__(self, mean: Float[torch.Tensor, " component"]) -> None:
        self.mean = mean

    def reconstruct(self, x: Rows) -> Rows:
        """The mean, everywhere."""
        return self.mean.to(x.device).expand(*x.shape[:-1], -1)


class Pca(Mean):
    """Projection onto the k first principal components: one subspace for all vectors."""

    name = "pca"

    def __init__(self, mean: Float[torch.Tensor, " component"], components: Float[torch.Tensor, "k component"]) -> None:
        super().__init__(mean)
        self.components = components

    def reconstruct(self, x: Rows) -> Rows:
        """The mean and the part of the vector in the subspace."""
        mean, components = self.mean.to(x.device), self.components.to(x.device)
        return mean + self.kept((x.float() - mean) @ components.T) @ components

    def kept(self, coefficients: Float[torch.Tensor, "*row k"]) -> Float[torch.Tensor, "*row k"]:
        """The coefficients that are used: all."""
        return coefficients


class PcaTopK(Pca):
    """All principal components as a dictionary, of which each vector uses the k of largest coefficient, whatever its sign."""

    name = "pca_topk"

    def __init__(
        self, mean: Float[torch.Tensor, " component"], components: Float[torch.Tensor, "all component"], k: int
    ) -> None:
        super().__init__(mean, components)
        self.k = k

    def kept(self, coefficients: Float[torch.Tensor, "*row all"]) -> Float[torch.Tensor, "*row all"]:
        """The largest, the others 0."""
        return _largest(coefficients, self.k, coefficients.abs())


class RandomDecoder(Mean):
    """As many random unit rows as there are latents, of which each vector uses the k it points along most, on one scale.

    The scale is the one of least squares over the vectors fitted on.
    """

    name = "random_decoder"

    def __init__(
        self, mean: Float[torch.Tensor, " component"], rows: Float[torch.Tensor, "latent component"], k: int
    ) -> None:
        super().__init__(mean)
        self.rows, self.k, self.scale = rows, k, 1.0

    def fit(self, x: Float[torch.Tensor, "row component"]) -> RandomDecoder:
        """Set the scale on some vectors, spread over those given."""
        above = below = 0.0
        for part in in_parts(x[:: max(1, len(x) // _FITTED)], len(self.rows)):
            written = self.written(part)
            above += float(((part.float() - self.mean) * written).sum(dtype=torch.float64))
            below += float((written * written).sum(dtype=torch.float64))
        self.scale = above / below if below > 0 else 0.0
        return self

    def reconstruct(self, x: Rows) -> Rows:
        """The mean and the scaled sum of the rows it points along most."""
        return self.mean.to(x.device) + self.scale * self.written(x)

    def written(self, x: Rows) -> Rows:
        """The sum, not yet scaled."""
        rows = self.rows.to(x.device)
        along = ((x.float() - self.mean.to(x.device)) @ rows.T).relu()
        return _largest(along, self.k, along) @ rows


def controls_for(
    autoencoder: Autoencoder, fitted: Float[torch.Tensor, "row component"], *, k: int, draws: int, seed: int
) -> list[Reconstruction]:
    """The controls of an autoencoder, fitted on the vectors that are not judged.

    Args:
        autoencoder: what is judged.
        fitted: what it stands for, of the vectors that are not judged.
        k: numbers a vector is written with: the autoencoder's mean L0, rounded.
        draws: of the random ones.
        seed: of the draws.

    Returns:
        zero, mean, pca, pca_topk, then every draw of random_decoder and of shuffled. A transcoder does not see what it
        predicts, so that those which do are no controls of it: it has zero, mean and shuffled.
    """
    mean, components = principal_components(fitted)
    k = max(1, min(k, len(components)))
    generator = torch.Generator().manual_seed(seed)
    sees_target = autoencoder.target_site is None
    found: list[Reconstruction] = [Zero(fitted.shape[1]), Mean(mean)]
    if sees_target:
        found += [Pca(mean, components[:k]), PcaTopK(mean, components, k)]
    for _ in range(draws):
        rows = random_rows(autoencoder.d_sae, fitted.shape[1], generator)
        if sees_target:
            found.append(RandomDecoder(mean, rows, min(k, autoencoder.d_sae)).fit(fitted))
        found.append(Shuffled(autoencoder, generator))
    return found


def principal_components(
    x: Float[torch.Tensor, "row component"],
) -> tuple[Float[torch.Tensor, " component"], Float[torch.Tensor, "component component"]]:
    """Mean and principal components of vectors, those of largest variance first, in float32.

    Example:
        >>> mean, components = principal_components(torch.tensor([[3.0, 1.0], [-3.0, 1.0]]))
        >>> mean.tolist(), components[0].abs().tolist()
        ([0.0, 1.0], [1.0, 0.0])
    """
    mean = x.mean(0, dtype=torch.float64)
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    for part in in_parts(x, x.shape[1]):
        centred = part.double() - mean
        covariance += centred.T @ centred
    _, vectors = torch.linalg.eigh(covariance)
    return mean.float(), vectors.T.flip(0).float().contiguous()


def random_rows(count: int, width: int, generator: torch.Generator) -> Float[torch.Tensor, "row component"]:
    """Unit vectors, uniform on the sphere."""
    drawn = torch.randn(count, width, generator=generator)
    found: torch.Tensor = drawn / drawn.norm(dim=-1, keepdim=True)
    return found


def in_parts(x: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Rows a few at a time, so that as many numbers of `width` a row as memory bears are held at once."""
    yield from torch.split(x, max(1, _ELEMENTS // max(width, 1)))


def _largest(values: torch.Tensor, k: int, by: torch.Tensor) -> torch.Tensor:
    """`values` with all but the k that are largest in `by` set to 0."""
    places = by.topk(min(k, by.shape[-1]), dim=-1).indices
    return torch.zeros_like(values).scatter(-1, places, values.gather(-1, places))
