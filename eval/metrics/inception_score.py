"""The Inception Score of logits. N samples · K classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.moments import BLOCK
from eval.metrics.one_thread import one_thread


class InceptionScore(NamedTuple):
    """Mean and standard deviation over all splits, as in ADM's evaluator; and the mean over splits of full length."""

    mean: float
    std: float
    whole_splits: float


def inception_score(logits: Tensor | Iterable[Tensor], split: int) -> InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) within each split of `split` rows (N, K) (arXiv 1606.03498, Sec. 4).

    As in ADM's evaluator, splits follow the order of the rows, and the last one may be short, which lowers the mean.
    Rows may come in parts of any length; at most about one split is in memory.
    """
    scores, sizes = [], []
    with one_thread():
        for part in _regrouped([logits] if isinstance(logits, Tensor) else logits, split):
            scores.append(_split_score(part))
            sizes.append(len(part))
    values = torch.tensor(scores, dtype=torch.float64)
    whole = values[[size == split for size in sizes]] if split in sizes else values
    return InceptionScore(values.mean().item(), values.std(correction=0).item(), whole.mean().item())


def _regrouped(parts: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in parts of `size`; the last one may be shorter."""
    held: list[Tensor] = []
    for part in parts:
        for piece in part.split(size):
            held.append(piece)
            if sum(map(len, held)) >= size:
                rows = torch.cat(held)
                yield rows[:size]
                held = [rows[size:]] if len(rows) > size else []
    if held:
        yield torch.cat(held)


def _split_score(logits: Tensor) -> float:
    """exp(mean Σ p·log p − Σ q·log q) with q the mean of p. log_softmax keeps probabilities of 0 finite."""
    total = torch.zeros(logits.shape[1], dtype=torch.float64, device=logits.device)
    negative_entropy = torch.zeros((), dtype=torch.float64, device=logits.device)
    for block in logits.split(BLOCK):
        log_p = block.double().log_softmax(1)
        total += log_p.exp().sum(0)
        negative_entropy += (log_p.exp() * log_p).sum()
    q = total / len(logits)
    marginal = torch.special.xlogy(q, q).sum()
    return float((negative_entropy / len(logits) - marginal).exp().item())
