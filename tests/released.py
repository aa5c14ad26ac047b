"""The architecture of the paper's PyTorch code, in torch: what its checkpoints compute. Needs torch.

Axis letters: B batch, S tokens, Z latent, A attributes, N aspects, V vocabulary.
"""

import numpy as np
import released_files
import torch
from released_files import ASPECTS, ATTRIBUTES, BERT, BOS, EOS, GPT2, HIDDEN, LATENT, ROWS
from scipy.integrate import solve_ivp
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2Model

torch.set_num_threads(1)  # more would only wait for each other: everything here is tiny


class LatentEncoder(BertModel):
    """BERT, the mean over a text's tokens through its pooler, and one linear layer to [mean, log variance]."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.linear = torch.nn.Linear(config.hidden_size, 2 * LATENT, bias=False)

    def gaussian(self, tokens, length):
        inside = (torch.arange(tokens.shape[1]) < length[:, None]).float()
        hidden = self(tokens, attention_mask=inside).last_hidden_state
        mean = (hidden * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
        return self.linear(self.pooler(mean[:, None])).chunk(2, dim=-1)


class LatentGpt2(GPT2Model):
    """GPT-2 with z added to every token's embedding and as a key and a value before every layer's others."""

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.latent_proj = torch.nn.Linear(LATENT, (config.n_layer + 1) * config.n_embd, bias=False)
        self.latent_embed = torch.nn.Linear(LATENT, config.n_embd, bias=False)

    def hidden(self, tokens, z):
        past = DynamicCache()
        for i, chunk in enumerate(self.latent_proj(z).chunk(self.config.n_layer + 1, dim=-1)[:-1]):
            heads = chunk.view(len(z), 1, self.config.n_head, -1).transpose(1, 2)
            past.update(heads, heads, i)
        positions = torch.arange(1, tokens.shape[1] + 1)[None]
        embedded = self.wte(tokens) + self.latent_embed(z)[:, None]
        return self(inputs_embeds=embedded, past_key_values=past, position_ids=positions).last_hidden_state


class Decoder(torch.nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.transformer = LatentGpt2(config)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, tokens, z):
        """Logits (B, S, V) after each token of replies that start with <bos>."""
        return self.lm_head(self.transformer.hidden(tokens, z))


class Released(torch.nn.Module):
    def __init__(self, posterior: bool = True):
        super().__init__()

        def encoder():
            return LatentEncoder(BertConfig(**without_type(BERT), attn_implementation="eager"))

        self.prior_encoder = encoder()
        if posterior:
            self.posterior_encoder = encoder()
        sizes = without_type(GPT2) | {"vocab_size": ROWS}
        self.decoder = Decoder(GPT2Config(**sizes, attn_implementation="eager"))
        self.latent_cls = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(LATENT, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, ASPECTS))
            for _ in range(ATTRIBUTES)
        )

    def logits_of_attributes(self, z):
        return torch.stack([head(z) for head in self.latent_cls], dim=-2)

    def energy(self, z, aspects, weights):
        """E(P|z) (B,): aspects and weights (B, A), aspect -1 where an attribute is not controlled."""
        log_p = F.log_softmax(self.logits_of_attributes(z), dim=-1)
        picked = log_p.gather(-1, aspects.clamp(min=0)[..., None])[..., 0]
        return -(picked * weights * (aspects >= 0)).sum(-1)

    def sampled(self, mean, logvar, aspects, weights, with_prior: bool):
        """z(0) from z(1) = mean (B, Z), by a solver that is not ours, in float64."""
        gradient = self.energy_gradient
        rows = []
        for mu, log_variance, wanted, weight in zip(mean, logvar, aspects, weights, strict=True):
            mu, variance = mu.double().numpy(), log_variance.double().exp().numpy()
            wanted, weight = wanted.numpy(), weight.numpy()

            def field(t, z, mu=mu, variance=variance, wanted=wanted, weight=weight):
                beta = 0.1 + t * (20.0 - 0.1)
                if with_prior:
                    return -beta / 2 * (((variance - 1) * z + mu) / variance - gradient(z, wanted, weight))
                return beta / 2 * gradient(z, wanted, weight)

            solution = solve_ivp(field, (1.0, 0.0), mu, method="DOP853", rtol=1e-8, atol=1e-8)
            assert solution.success
            rows.append(solution.y[:, -1])
        return np.stack(rows)

    def energy_gradient(self, z, aspects, weights):
        """That of the energy at one z, as autograd has it (a test compares them) but in a hundredth of the time."""
        parts = [getattr(head[i], kind) for head in self.latent_cls for i in (0, 2) for kind in ("weight", "bias")]
        parts = [part.detach().numpy().astype(float) for part in parts]
        w1, b1, w2, b2 = (np.stack(parts[i::4]) for i in range(4))
        before = w1 @ z + b1
        logits = np.einsum("anf,af->an", w2, np.maximum(before, 0)) + b2
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        towards = (p - np.eye(ASPECTS)[aspects]) * (weights * (aspects >= 0))[:, None]
        return np.einsum("afz,af,anf,an->z", w1, before > 0, w2, towards, optimize=True)

    def greedy(self, z, least: int, most: int):
        """One latent's reply, and the smallest distance by which a token was ahead of the next best."""
        tokens, margin = [BOS], np.inf
        while len(tokens) <= most:
            logits = self.decoder(torch.tensor([tokens]), z[None])[0, -1].clone()
            logits[BOS] = -np.inf
            if len(tokens) <= least:
                logits[EOS] = -np.inf
            best = logits.topk(2)
            margin = min(margin, (best.values[0] - best.values[1]).item())
            if best.indices[0] == EOS:
                break
            tokens.append(best.indices[0].item())
        return tokens[1:], margin


def without_type(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "model_type"}


def load(state: dict[str, np.ndarray]) -> Released:
    """With these weights, which have to be all of its own and no others."""
    model = Released(any(name.startswith("posterior_encoder.") for name in state))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == released_files.shapes(
        hasattr(model, "posterior_encoder")
    )
    model.load_state_dict({name: torch.tensor(tensor) for name, tensor in state.items()})
    return model.eval()
