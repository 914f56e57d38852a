"""Trains the demo model from scratch on a CPU, for a fixed number of steps, resuming where it was stopped.

python -m moescope.probes.demo.train --cache FOLDER            # train, or go on; then export
python -m moescope.probes.demo.train --cache FOLDER --export   # only write the model of the last checkpoint
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen3MoeForCausalLM

from moescope.probes.demo import CURVES_PATH, MODEL_DIR
from moescope.probes.demo.architecture import build_model, demo_config, losses
from moescope.probes.demo.checkpoint import Progress, load_checkpoint, save_checkpoint
from moescope.probes.demo.heldout import Passage, load_passages, mean_nll_nats, read_passages
from moescope.probes.demo.packages import DEFAULT_CACHE
from moescope.probes.demo.rows import RowSource, tokenize_documents
from moescope.probes.demo.sources import load_documents

logger = logging.getLogger(__name__)

MAX_WEIGHT_BYTES = 16_000_000


@dataclass(frozen=True)
class TrainConfig:
    """Every number that decides the weights: the same ones and the same text give the same weights."""

    steps: int = 3000
    rows_a_step: int = 8
    row_length: int = 512
    peak_lr: float = 3e-3
    final_lr_share: float = 0.05
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 20240
    threads: int = 2
    curve_every: int = 20
    heldout_every: int = 200
    checkpoint_every: int = 100

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to `final_lr_share` of the peak at the last step."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        cosine = (1 + math.cos(math.pi * done)) / 2
        return self.peak_lr * (self.final_lr_share + (1 - self.final_lr_share) * cosine)


def build_optimizer(model: Qwen3MoeForCausalLM, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; norm weights are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, fused=True)


def train_step(
    model: Qwen3MoeForCausalLM,
    optimizer: torch.optim.AdamW,
    rows: RowSource,
    *,
    step: int,
    config: TrainConfig,
) -> dict[str, float]:
    """One step; returns its curve point."""
    learning_rate = config.learning_rate(step)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    batch = torch.from_numpy(rows.batch(step, rows=config.rows_a_step))
    nll, balance = losses(model, batch)
    optimizer.zero_grad()
    loss = nll + model.config.router_aux_loss_coef * balance
    loss.backward()  # type: ignore[no-untyped-call]  # transformers and torch have no types here
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    optimizer.step()
    return {"step": step + 1, "loss": nll.item(), "aux_loss": balance.item(), "lr": learning_rate}


def train(
    model: Qwen3MoeForCausalLM,
    rows: RowSource,
    config: TrainConfig,
    *,
    checkpoint: Path,
    passages: list[Passage] | None = None,
    stop_after: int | None = None,
) -> Progress:
    """Train `model` in place up to `config.steps` (or `stop_after`), from `checkpoint` where there is one.

    A run that was stopped and resumed ends with bit-identical weights to one that was not.
    """
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    optimizer = build_optimizer(model, config)
    progress = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else Progress()
    last = min(config.steps, stop_after or config.steps)
    model.train()
    first, started, before = progress.step, time.monotonic(), progress.wall_seconds
    while progress.step < last:
        point: dict[str, object] = dict(train_step(model, optimizer, rows, step=progress.step, config=config))
        progress.step += 1
        if passages and (progress.step % config.heldout_every == 0 or progress.step == config.steps):
            point["heldout"] = mean_nll_nats(read_passages(model, passages))
        if progress.step % config.curve_every == 0 or "heldout" in point:
            progress.curves.append(point)
            elapsed = time.monotonic() - started
            tokens_a_second = (progress.step - first) * config.rows_a_step * config.row_length / elapsed
            minutes_left = elapsed / (progress.step - first) * (config.steps - progress.step) / 60
            logger.info("%s | %.0f tokens/s, %.1f min left", json.dumps(point), tokens_a_second, minutes_left)
        progress.wall_seconds = before + time.monotonic() - started
        if progress.step % config.checkpoint_every == 0 or progress.step == last:
            save_checkpoint(checkpoint, model, optimizer, progress)
    return progress


def export_model(model: Qwen3MoeForCausalLM, out: Path) -> None:
    """Round the weights to bfloat16 once and save them, with a config that loads them as float32.

    Raises ValueError where the weights take more than `MAX_WEIGHT_BYTES`.
    """
    torch.nn.Module.to(model, torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers and torch have no types here
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(out)
    config_path = out / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights_path = out / "model.safetensors"
    weights_path.chmod(0o644)  # safetensors writes it readable by its owner only
    n_bytes = weights_path.stat().st_size
    if n_bytes > MAX_WEIGHT_BYTES:
        raise ValueError(f"the weights take {n_bytes} bytes, more than {MAX_WEIGHT_BYTES}: make the model smaller")


def main() -> None:
    """Command line: train or go on, then export model and curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder with train.jsonl and the checkpoint")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="model folder, which already has the tokenizer")
    parser.add_argument("--export", action="store_true", help="train nothing, export the last checkpoint")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = TrainConfig()
    tokenizer = AutoTokenizer.from_pretrained(arguments.out)
    model = build_model(demo_config(tokenizer), seed=config.seed)
    checkpoint = arguments.cache / "checkpoint.pt"
    if arguments.export:
        progress = load_checkpoint(checkpoint, model)
    else:
        tokens = tokenize_documents(load_documents(arguments.cache / "train.jsonl"), tokenizer)
        rows = RowSource(tokens, seed=config.seed, length=config.row_length, bos=tokenizer.bos_token_id)
        logger.info("rows an epoch: %s", rows.rows_an_epoch)
        progress = train(model, rows, config, checkpoint=checkpoint, passages=load_passages(tokenizer))
    export_model(model, arguments.out)
    with CURVES_PATH.open("w", encoding="utf-8") as file:
        for point in progress.curves:
            file.write(json.dumps(point) + "\n")
    logger.info("exported step %d after %.1f min", progress.step, progress.wall_seconds / 60)


if __name__ == "__main__":
    main()
