"""The bundled demo model: a small mixture-of-experts model, its corpus and how both were made.

Importing this package loads nothing heavy: it only says where the shipped files lie. The modules beside it
rebuild them, in this order: ``sources`` (text from Debian packages), ``tokenizer``, ``train``, ``evaluate``
(the model card).
"""

from __future__ import annotations

from pathlib import Path

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder that ``transformers`` loads: configuration, weights, tokenizer and the model card."""

CORPUS_PATH: Path = Path(__file__).resolve().parent / "corpus.jsonl"
"""Held-out labelled passages, one JSON object a line with ``text``, ``label``, ``source`` and ``license``."""

CURVES_PATH: Path = Path(__file__).resolve().parent / "curves.jsonl"
"""Training curves by line: ``step``, ``loss``, ``aux_loss``, ``lr`` and at times ``heldout``."""

EVIDENCE_PATH: Path = MODEL_DIR / "evidence.json"
"""The numbers behind the model card: held-out NLL with its baselines, expert load, specialization."""

DOMAINS: tuple[str, ...] = (
    "bible",
    "chinese",
    "dictionary",
    "french",
    "german",
    "japanese",
    "kernel",
    "perl",
    "python",
    "spanish",
)
"""The ten labels of the corpus, in alphabetical order."""

__all__ = ["CORPUS_PATH", "CURVES_PATH", "DOMAINS", "EVIDENCE_PATH", "MODEL_DIR"]
