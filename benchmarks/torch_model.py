"""The model in PyTorch, on transformers' BERT and GPT-2: what the PyTorch side of the benchmarks runs. Needs torch.

Its parameters have the names of the paper's code, so that ours load by `weights.released`.

Axis letters: B batch, S tokens, D model, H heads, K head size, Z latent, A attributes, N aspects, R scored tokens,
V vocabulary.
"""

from itertools import combinations
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel, Cache, DynamicCache, GPT2Config, GPT2LMHeadModel

from miracle_jax import config, weights

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # ours to transformers'
IGNORED = -100
"""Target of a row that no loss counts (torch's own default)."""

Attention = Literal["eager", "sdpa"]


class LatentEncoder(BertModel):
    """A text to a Gaussian over z: the mean over its tokens through BERT's pooler, and one linear layer (Eq. 1)."""

    def __init__(self, shape: config.Bert, latent: config.Latent, attention: Attention):
        super().__init__(
            BertConfig(
                vocab_size=shape.vocab_size, hidden_size=shape.width, num_hidden_layers=shape.depth,
                num_attention_heads=shape.heads, intermediate_size=shape.mlp, type_vocab_size=shape.segments,
                max_position_embeddings=shape.max_positions, hidden_act=ACTIVATIONS[shape.activation],
                layer_norm_eps=shape.norm_eps, initializer_range=shape.init_std, hidden_dropout_prob=shape.dropout,
                attention_probs_dropout_prob=shape.dropout, attn_implementation=attention,
                pad_token_id=None,  # its row of the table would get no gradient, in ours it does where it is a word
            )
        )  # fmt: skip
        self.linear = nn.Linear(shape.width, 2 * latent.size, bias=False)
        self.logvar_shift = latent.logvar_shift

    def gaussian(self, tokens: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens (B, S), length (B,) -> mean and log variance (B, Z), float32."""
        inside = torch.arange(tokens.shape[1], device=tokens.device) < length[:, None]
        # Given two axes, transformers asks whether all of the mask is set, for which a GPU has to stop; given four, it
        # takes the mask as it is. The eager form wants numbers to add, and makes them of two axes.
        mask = inside[:, None, None] if self.config._attn_implementation == "sdpa" else inside
        hidden = self(tokens, attention_mask=mask).last_hidden_state.float()
        mean = (hidden * inside[..., None]).sum(1) / length.clamp(min=1)[:, None]
        mean, logvar = self.linear(self.pooler(mean.to(self.dtype)[:, None])).float().chunk(2, dim=-1)
        return mean, logvar + self.logvar_shift


class LatentGpt2(GPT2LMHeadModel):
    """GPT-2 with z added to every token's embedding and as one key and value before every layer's others.

    The latent is position 0. It enters as a key/value cache that already holds one position, which is how transformers
    (training and `generate` alike) takes what has been read before; so tokens start at position 1 by themselves.
    """

    def __init__(self, shape: config.Gpt2, latent_size: int, attention: Attention):
        super().__init__(
            GPT2Config(
                vocab_size=shape.vocab_size, n_embd=shape.width, n_layer=shape.depth, n_head=shape.heads,
                n_inner=shape.mlp, n_positions=shape.max_positions, layer_norm_epsilon=shape.norm_eps,
                activation_function=ACTIVATIONS[shape.activation], initializer_range=shape.init_std,
                embd_pdrop=shape.dropout, attn_pdrop=shape.dropout, resid_pdrop=shape.dropout,
                bos_token_id=None, eos_token_id=None, attn_implementation=attention,
            )
        )  # fmt: skip
        self.lm_head = nn.Linear(shape.width, shape.vocab_size)  # GPT-2's own has no bias
        self.lm_head.weight = self.transformer.wte.weight
        self.transformer.latent_embed = nn.Linear(latent_size, shape.width, bias=False)
        self.transformer.latent_proj = nn.Linear(latent_size, (shape.depth + 1) * shape.width, bias=False)

    def fill(self, cache: Cache, z: torch.Tensor) -> Cache:
        """Puts the latents (B, Z) at position 0 of an empty cache."""
        chunks = self.transformer.latent_proj(z).chunk(self.config.n_layer + 1, dim=-1)
        for i, chunk in enumerate(chunks[:-1]):  # the last has no layer
            heads = chunk.view(len(z), 1, self.config.n_head, -1).transpose(1, 2)  # (B, H, 1, K)
            cache.update(heads, heads, i)
        return cache

    def shift(self, z: torch.Tensor) -> torch.Tensor:
        """What the latents (B, Z) add to every token's embedding, (B, 1, D)."""
        return self.transformer.latent_embed(z)[:, None]

    # `generate` reads from the names here what it may hand over.
    def forward(
        self, input_ids=None, shift=None, past_key_values=None, attention_mask=None, position_ids=None,
        logits_to_keep=0, **others,
    ):  # fmt: skip
        """As GPT2LMHeadModel, with `shift` (B, 1, D) added to the embeddings."""
        return super().forward(
            inputs_embeds=self.transformer.wte(input_ids) + shift, past_key_values=past_key_values,
            attention_mask=attention_mask, position_ids=position_ids, logits_to_keep=logits_to_keep, **others,
        )  # fmt: skip

    def hidden(self, tokens: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """The last layer's output (B, S, D) for whole replies (B, S) that start with `<bos>`."""
        z = z.to(self.dtype)
        embedded = self.transformer.wte(tokens) + self.shift(z)
        past = self.fill(DynamicCache(), z)
        return self.transformer(inputs_embeds=embedded, past_key_values=past).last_hidden_state


class TorchMiracle(nn.Module):
    """Prior encoder, posterior encoder, decoder and attribute heads."""

    def __init__(self, settings: config.Config, sizes: tuple[int, ...], attention: Attention = "sdpa"):
        """sizes: number of aspects of each attribute. attention: "eager" as released, "sdpa" modernised."""
        super().__init__()
        decoder, latent = settings.decoder, settings.latent
        if decoder.family != "gpt2" or decoder.sees_context or decoder.lora_rank or decoder.word_dropout:
            raise ValueError("the PyTorch peers have GPT-2 decoders only, which see z alone and all words, no adapters")
        self.loss = settings.loss
        self.prior_encoder = LatentEncoder(settings.encoder, latent, attention)
        if settings.loss.posterior:
            self.posterior_encoder = LatentEncoder(settings.encoder, latent, attention)
        self.decoder = LatentGpt2(decoder, latent.size, attention)
        activation = {"silu": nn.SiLU, "relu": nn.ReLU}[latent.activation]
        self.latent_cls = nn.ModuleList(
            nn.Sequential(nn.Linear(latent.size, latent.hidden), activation(), nn.Linear(latent.hidden, size))
            for size in sizes
        )

    @classmethod
    def from_ours(
        cls, settings: config.Config, sizes: tuple[int, ...], params: dict, attention: Attention = "sdpa"
    ) -> "TorchMiracle":
        """With our parameters (nested dict of a cvae.Miracle), on the CPU, in evaluation mode."""
        model = cls(settings, sizes, attention)
        state = weights.dump(weights.released(settings, len(sizes)), params)
        state = {name: torch.tensor(array) for name, array in state.items()}
        for i, size in enumerate(sizes):  # ours have as many rows as the largest attribute
            for name in (f"latent_cls.{i}.2.weight", f"latent_cls.{i}.2.bias"):
                state[name] = state[name][:size]
        state["decoder.lm_head.weight"] = state["decoder.transformer.wte.weight"]
        model.load_state_dict(state)  # strict: nothing missing, nothing too many
        return model.eval()

    def encode(self, tokens: torch.Tensor, length: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts (B, S) -> the prior's mean and log variance (B, Z)."""
        return self.prior_encoder.gaussian(tokens, length)

    def logits(self, tokens: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Scores (B, S, V) of the token after each of replies (B, S) that start with `<bos>`."""
        return self.decoder.lm_head(self.decoder.hidden(tokens, z))

    def losses(self, batch: dict[str, torch.Tensor], noise: torch.Tensor | float = 0.0) -> dict[str, torch.Tensor]:
        """The four losses by name, unweighted, as `miracle_jax.losses.parts` of a step that is one batch.

        Args:
          batch: as `torch_train.to_torch` makes it; where it has `scored` and `target` (R,), only those tokens reach
            the head, of (B * S) in all.
          noise: scale of the noise in z: 1 for a draw, 0 for the mean.
        """
        settings, labels = self.loss, batch["labels"].long()
        prior = self.prior_encoder.gaussian(batch["context"], batch["context_length"])
        source = prior
        if settings.posterior:
            source = self.posterior_encoder.gaussian(batch["joint"], batch["joint_length"])
        z = source[0] + noise * torch.exp(0.5 * source[1]) * torch.randn_like(source[0])

        hidden = self.decoder.hidden(batch["reply"], z)
        if "scored" in batch:
            scores, target = self.decoder.lm_head(hidden.flatten(0, 1)[batch["scored"]]), batch["target"]
        else:
            scores, target = self.decoder.lm_head(hidden)[:, :-1].flatten(0, 1), targets(batch).flatten()
        reconstruct = F.cross_entropy(scores.float(), target, ignore_index=IGNORED, reduction="sum")
        named = {"reconstruct": reconstruct / (batch["reply_length"] - 1).sum()}
        if settings.posterior:
            each = gaussian_kl(source, prior)
            named["kl"] = each.where(each > settings.kl_floor, 0.0).sum(-1).mean()
        if settings.classify:
            heads = enumerate(self.latent_cls)
            sums = [F.cross_entropy(f(z), labels[:, i], ignore_index=-1, reduction="sum") for i, f in heads]
            named["classify"] = sum(sums) / (labels >= 0).sum().clamp(min=1)
        if settings.gap:
            named["gap"] = attribute_gap(z, labels, settings.gap_distance)
        return named

    def objective(
        self, batch: dict[str, torch.Tensor], cycle: torch.Tensor | float, noise: torch.Tensor | float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """What training minimises (Eq. 6), and its parts. cycle: the cyclical KL weight, 0 or 1."""
        named = self.losses(batch, noise)
        factors = {
            "reconstruct": self.loss.reconstruct, "kl": self.loss.kl * cycle, "classify": self.loss.classify,
            "gap": self.loss.gap,
        }  # fmt: skip
        return sum(factors[name] * value for name, value in named.items()), named


def targets(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The token after each of a reply's but the last place, (B, S - 1); IGNORED where that is padding."""
    target = batch["reply"][:, 1:].long()
    inside = torch.arange(target.shape[1], device=target.device) < batch["reply_length"][:, None] - 1
    return target.where(inside, IGNORED)


def gaussian_kl(q: tuple[torch.Tensor, torch.Tensor], p: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """KL(q || p) of each dimension (B, Z), in nats. q, p: mean and log variance."""
    (q_mean, q_logvar), (p_mean, p_logvar) = q, p
    ratio = torch.exp(q_logvar - p_logvar)
    return 0.5 * (p_logvar - q_logvar - 1.0 + ratio + (q_mean - p_mean) ** 2 * torch.exp(-p_logvar))


def attribute_gap(z: torch.Tensor, labels: torch.Tensor, distance: str) -> torch.Tensor:
    """Distances between the attributes' batch means of z (B, Z), over all pairs that the batch has (Eq. 5)."""
    member = (labels >= 0).to(z.dtype)  # (B, A)
    number = member.sum(0)
    means = member.T @ z / number.clamp(min=1)[:, None]
    total = z.new_zeros(())
    for a, b in combinations(range(labels.shape[1]), 2):
        squared = (means[a] - means[b]) ** 2
        pair = squared.mean() if distance == "squared" else squared.sum().clamp(min=1e-30).sqrt()
        total = total + pair.where((number[a] > 0) & (number[b] > 0), 0.0)
    return total
