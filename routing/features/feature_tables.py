"""What a run's tables say of an autoencoder: which one is meant, its numbers, and its examples as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moescope.core.errors import InputError
from moescope.store.run import Run

# A latent is called dense where it is active on more than this share of tokens (arXiv 2406.04093 leaves those over a tenth out).
DENSE = 0.1
RULES = ("predicted_by_token", "predicted_by_previous_token", "predicted_by_label")
RULE_NAMES = {
    "predicted_by_token": "the token",
    "predicted_by_previous_token": "the token before",
    "predicted_by_label": "the label",
}
_SAES = """
    SELECT s.sae_id::VARCHAR AS sae_id, s.name, s.site, s.d_sae, s.architecture, s.trained_on = $run AS trained_here
    FROM saes s
    WHERE s.sae_id IN (SELECT sae_id FROM query_table($table) WHERE run_id = $run AND {having})
    ORDER BY s.created_at NULLS FIRST, s.name
"""
_SIZE = """
    SELECT any_value(tokens) AS tokens, count(*) AS latents, count(*) FILTER (active > 0) AS alive,
        (SELECT count(*) FROM tokens WHERE run_id = $run) AS all_tokens
    FROM features
    WHERE run_id = $run AND sae_id = $sae
"""
_WINDOWS = """
    SELECT c.feature, c.stratum, c.rank, c.sequence_id, c.position, c.value, c.first_position, s.label, c.activations,
        list(t.token_id ORDER BY t.position) AS token_ids
    FROM feature_contexts c
    JOIN sequences s ON s.run_id = c.run_id AND s.sequence_id = c.sequence_id
    JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id
        AND t.position >= c.first_position AND t.position < c.first_position + len(c.activations)
    WHERE c.run_id = $run AND c.sae_id = $sae AND list_contains($features, c.feature) AND c.stratum <= $strata AND c.rank < $ranks
    GROUP BY ALL
    ORDER BY c.feature, c.stratum, c.rank
"""
_SHOWN = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class Sae:
    """An autoencoder of a store, as its row says.

    Attributes:
        sae_id, name, site, d_sae, architecture: of its row.
        trained_here: whether the run is the one it was trained on.
    """

    sae_id: str
    name: str
    site: str
    d_sae: int
    architecture: str
    trained_here: bool


def chosen_sae(run: Run, sae: str | None, *, table: str = "features", having: str = "true") -> Sae:
    """The autoencoder of that name or `sae_id`; the newest that has rows of `table` for the run where None.

    Args:
        run, sae: of which.
        table: where it must have rows.
        having: a condition, in SQL, that some of these must meet.

    Raises:
        InputError: there is none of that name with such rows.
    """
    found = run.sql(_SAES.format(having=having), {"table": table}).fetchall()
    mine = [row for row in found if sae is None or sae in (row[0], row[1])]
    if not mine:
        names = ", ".join(str(row[1]) for row in found)
        joined = table == "feature_experts"
        raise InputError(
            f"there is nothing in {table} of an autoencoder {sae!r} on run {run.name!r}" if sae else f"there is nothing in {table} "
            f"of run {run.name!r}",
            expected=f"one of {names}" if names else None,
            fix="join its latents to experts: moescope sae experts, or ms.sae.feature_experts"
            if joined
            else "read its features: moescope sae read, or ms.sae.read",
        )  # fmt: skip
    sae_id, name, site, d_sae, architecture, here = mine[-1]
    return Sae(str(sae_id), str(name), str(site), int(d_sae or 0), str(architecture), bool(here))


def reading_notes(run: Run, sae: Sae) -> tuple[str, ...]:
    """Which autoencoder, on which part of the run."""
    tokens, latents, alive, all_tokens = run.store.fetch(_SIZE, {"run": run.run_id, "sae": sae.sae_id})[0]
    part = (
        f"{tokens:,} of the run's {all_tokens:,} tokens" if tokens < all_tokens else f"all {tokens:,} tokens of the run"
    )
    notes = [f"Autoencoder {sae.name} ({sae.architecture}, {latents:,} latents) at {sae.site}, read on {part}."]
    if alive < latents:
        notes.append(f"{latents - alive:,} latents are active on none of them.")
    if sae.trained_here and tokens >= 0.9 * all_tokens:
        notes.append("It was trained on these tokens: other texts may show other examples.")
    return tuple(notes)


@dataclass(frozen=True)
class Window:
    """An example of a latent.

    Attributes:
        feature, stratum, rank, sequence_id, position, value, label: as stored.
        pieces: text of each token.
        activations: on each token, None where it was not encoded.
        peak: which token of the window is the example's.
    """

    feature: int
    stratum: int
    rank: int
    sequence_id: int
    position: int
    value: float
    label: str | None
    pieces: tuple[str, ...]
    activations: tuple[float | None, ...]
    peak: int

    def marked(self, reach: int | None = None) -> str:
        """The text with the peak between ⟦ and ⟧; `reach` tokens on either side, or all of the window."""
        first = 0 if reach is None else max(0, self.peak - reach)
        last = len(self.pieces) if reach is None else self.peak + reach + 1
        end = next(
            (i for i in range(self.peak, len(self.pieces)) if self.pieces[i]), self.peak
        )  # a character's last token
        before, after = "".join(self.pieces[first : self.peak]), "".join(self.pieces[end + 1 : max(last, end + 1)])
        return f"{before}⟦{self.pieces[end]}⟧{after}"


def windows(
    run: Run,
    sae: Sae,
    features: Sequence[int],
    vocabulary: Mapping[int, bytes],
    *,
    strata: int = 100,
    ranks: int = 10_000,
) -> dict[int, list[Window]]:
    """Latent → its examples, the largest activation first, then the strata.

    Args:
        run, sae: on what, of what.
        features: latents.
        vocabulary: token id → bytes, of `moescope.routing.context.pieces`.
        strata: largest number of a stratum; 0 for the largest activations alone.
        ranks: examples of each stratum.
    """
    given = {"sae": sae.sae_id, "features": [int(f) for f in features], "strata": strata, "ranks": ranks}
    found: dict[int, list[Window]] = {int(feature): [] for feature in features}
    for row in run.sql(_WINDOWS, given).to_arrow_table().to_pylist():
        first, activations = int(row["first_position"]), tuple(row["activations"])
        peak = int(row["position"]) - first
        found[int(row["feature"])].append(
            Window(
                int(row["feature"]), int(row["stratum"]), int(row["rank"]), int(row["sequence_id"]), int(row["position"]),
                float(row["value"]), row["label"], token_texts(row["token_ids"], vocabulary), activations, peak,
            )
        )  # fmt: skip
    return found


def token_texts(ids: Sequence[int], vocabulary: Mapping[int, bytes]) -> tuple[str, ...]:
    """Text of each token. A character that is spread over several tokens stands at the last of them, the others being empty.

    Line breaks and tabs are shown as signs, ids without bytes as their number, and bytes that are no character as U+FFFD.

    Example:
        >>> token_texts([0, 1, 2, 3], {0: b"a", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b"b" + bytes([10])})
        ('a', '', 'é', 'b⏎')
    """
    found: list[str] = []
    held = b""
    for token in ids:
        raw = held + vocabulary.get(int(token), f"[{token}]".encode())
        complete = _complete(raw)
        found.append(raw[:complete].decode("utf-8", "replace"))
        held = raw[complete:]
    return tuple("".join(_SHOWN.get(c, c) for c in text) for text in found)


def _complete(raw: bytes) -> int:
    """How many bytes stand before a character that is cut off at the end."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:
            needed = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) if back >= needed else len(raw) - back
        if byte < 0x80:
            break
    return len(raw)


def words(ids: Sequence[int] | None, vocabulary: Mapping[int, bytes], most: int = 8) -> str | None:
    """Token ids as words in quotation marks, divided by spaces; None where there are none."""
    if ids is None:
        return None
    return " ".join(f"“{token_texts([i], vocabulary)[0]}”" for i in list(ids)[:most])
