"""Trains the demo model's byte-level BPE tokenizer on text balanced over the domains.

    python -m moescope.probes.demo.tokenizer --cache FOLDER

reads the cache's ``train.jsonl`` and writes the tokenizer's files into the model folder.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from moescope.probes.demo import DOMAINS, MODEL_DIR
from moescope.probes.demo.domains import Document
from moescope.probes.demo.packages import DEFAULT_CACHE
from moescope.probes.demo.sources import digest, load_documents

logger = logging.getLogger(__name__)

VOCABULARY_SIZE = 4096
MAX_LENGTH = 512
CHARACTERS_A_DOMAIN = 900_000
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"


def balanced_texts(documents: list[Document], characters: int) -> Iterator[str]:
    """Documents in a fixed pseudo-random order, until each domain gave `characters` characters."""
    for domain in DOMAINS:
        left = characters
        for document in sorted((d for d in documents if d.domain == domain), key=lambda d: digest(d.source)):
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                break


def train_tokenizer(texts: Iterator[str], *, vocabulary_size: int = VOCABULARY_SIZE) -> PreTrainedTokenizerFast:
    """A byte-level BPE that prepends ``<bos>`` by itself and gives any UTF-8 text back exactly.

    Digits are split off one by one, so that numbers take no vocabulary.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers and torch have no types here
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the tokenizer under the class name that every release of transformers knows."""
    tokenizer.save_pretrained(out)
    config_path = out / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in ("backend", "is_local", "local_files_only"):  # of this process, not of the tokenizer
        config.pop(key, None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> None:
    """Command line: train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder with the collected text")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the tokenizer's files")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    documents = load_documents(arguments.cache / "train.jsonl")
    tokenizer = train_tokenizer(balanced_texts(documents, CHARACTERS_A_DOMAIN))
    save_tokenizer(tokenizer, arguments.out)
    logger.info("%d tokens in the vocabulary, saved to %s", len(tokenizer), arguments.out)


if __name__ == "__main__":
    main()
