"""Contexts to latents and latents to replies in PyTorch, as released and modernised. Needs torch.

All run where the model is and in its precision: `model.to("cuda", torch.bfloat16)` beforehand is the modernised form.

Axis letters: B batch, S tokens, T reply tokens, Z latent, V vocabulary.
"""

from typing import Literal

import torch
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from benchmarks.torch_model import LatentGpt2, TorchMiracle


@torch.inference_mode()
def encode_contexts(
    model: TorchMiracle, tokens: torch.Tensor, length: torch.Tensor, batch_size: int, by_length: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contexts (B, S) with their lengths (B,) -> the prior's mean and log variance (B, Z), on the model's device.

    Batches are as wide as the longest of their texts. by_length: texts of similar length together (modernised); False
    takes them as they come (as released). tokens, length: on the CPU, where the lengths are read.
    """
    device = next(model.parameters()).device
    order = torch.argsort(length, stable=True) if by_length else torch.arange(len(length))
    parts = []
    for rows in order.split(batch_size):
        width = int(length[rows].max())
        parts.append(model.encode(tokens[rows, :width].to(device), length[rows].to(device)))
    back = torch.argsort(order).to(device)
    return tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))


@torch.inference_mode()
def generate_as_released(
    model: TorchMiracle,
    z: torch.Tensor,
    allowed: torch.Tensor,
    bos: int,
    eos: int,
    least: int,
    most: int,
    batch_size: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes one reply a latent, greedily: the whole prefix runs through the decoder, its head and the latent's
    projections for each token, without a cache, until every reply of its small batch has ended.

    Arguments and result: as `generate_modern`.
    """
    written = torch.full((len(z), most), eos, device=z.device)
    for start in range(0, len(z), batch_size):
        part = z[start : start + batch_size]
        tokens = torch.full((len(part), 1), bos, device=z.device)
        done = torch.zeros(len(part), dtype=torch.bool, device=z.device)
        for step in range(most):
            scores = model.logits(tokens, part)[:, -1].float().masked_fill(~allowed, -torch.inf)
            if step < least:
                scores[:, eos] = -torch.inf
            token = scores.argmax(-1).where(~done, eos)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            done = done | (token == eos)
            if done.all():
                break
        written[start : start + batch_size, : tokens.shape[1] - 1] = tokens[:, 1:]
    return written, (written != eos).sum(-1)


@torch.inference_mode()
def generate_modern(
    model: TorchMiracle,
    z: torch.Tensor,
    allowed: torch.Tensor,
    bos: int,
    eos: int,
    least: int,
    most: int,
    batch_size: int = 128,
    cache: Literal["dynamic", "static"] = "dynamic",
    compile: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes one reply a latent, greedily, by transformers' `generate` with a key/value cache.

    Args:
      z: the latents (B, Z), on the model's device.
      allowed: tokens (V,) that may be written at all.
      bos, eos: ids of `<bos>` and `<eos>`.
      least, most: `<eos>` is barred from the first `least` tokens; a reply is cut at `most`.
      batch_size: replies that are written together, and that wait for the longest of them.
      cache: one that grows, or one of fixed size, which is kept for the next call.
      compile: each step by torch.compile, on GPUs as one CUDA graph; needs the static cache.

    Returns:
      Token ids (B, T), `<eos>` from the end of each reply on, T = most; and the replies' lengths (B,) without `<eos>`.
    """
    if compile and cache != "static":
        raise ValueError("a cache that grows has another shape every step; compile needs cache='static'")
    decoder, parts = model.decoder, []
    for part in z.split(batch_size):
        size = len(part)
        if cache == "static" and size < batch_size < len(z):  # the last one: no new shape for it
            part = torch.cat([part, part[:1].expand(batch_size - size, -1)])
        parts.append(_generate(decoder, part.to(decoder.dtype), allowed, bos, eos, least, most, cache, compile)[:size])
    written = torch.cat(parts)
    return written, (written != eos).sum(-1)


def _generate(
    decoder: LatentGpt2, z: torch.Tensor, allowed, bos: int, eos: int, least: int, most: int, cache: str, compile: bool
) -> torch.Tensor:
    """One batch's tokens (B, most)."""
    # `generate` goes on from a cache when it is given all tokens from the first on, those that the cache holds too: the
    # first `<bos>` stands for the latent's position and is never read.
    start = torch.full((len(z), 2), bos, device=z.device)
    past = DynamicCache(config=decoder.config) if cache == "dynamic" else _static_cache(decoder, len(z), most, z)
    options = {}
    if compile:
        options["compile_config"] = CompileConfig()
        # Without it `generate` compiles on accelerators only, and says so in a warning.
        options["compile_config"]._compile_all_devices = True
    else:
        options["disable_compile"] = True  # with a static cache on a GPU it would compile unasked
    tokens = decoder.generate(
        start, attention_mask=torch.ones_like(start), past_key_values=decoder.fill(past, z), shift=decoder.shift(z),
        max_new_tokens=most, do_sample=False, eos_token_id=eos, pad_token_id=eos, use_cache=True,
        logits_processor=LogitsProcessorList([Barred(allowed, eos, start.shape[1] + least)]), **options,
    )[:, start.shape[1] :]  # fmt: skip
    return torch.nn.functional.pad(tokens, (0, most - tokens.shape[1]), value=eos)


def _static_cache(decoder: LatentGpt2, batch: int, most: int, like: torch.Tensor) -> StaticCache:
    """An empty cache for the latent's position, `<bos>` and all reply tokens but the last.

    `generate(cache_implementation="static")` cannot be given a position beforehand and makes a new cache each call, in
    other memory, for which CUDA graphs are recorded again. So it gets one of ours, kept with the decoder.
    """
    caches = decoder.__dict__.setdefault("static_caches", {})
    key = (batch, most, like.dtype, like.device)
    if key not in caches:
        caches[key] = StaticCache(config=decoder.config, max_cache_len=most + 1)
    caches[key].reset()
    return caches[key]


class Barred(LogitsProcessor):
    """Tokens that may not be written; `<eos>` as long as fewer than `least` tokens are there.

    As one mask, made once; transformers' own processors compare the whole vocabulary with a list at every step.
    """

    def __init__(self, allowed: torch.Tensor, eos: int, least: int):
        self.late, self.early, self.least = ~allowed, ~allowed, least
        self.early[eos] = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(self.early if input_ids.shape[1] < self.least else self.late, -torch.inf)
