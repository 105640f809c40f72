r"""PCME: probabilistic embeddings for cross-modal retrieval.

Chun, Oh, Sampaio de Rezende, Kalantidis, Larlus, "Probabilistic Embeddings for Cross-Modal
Retrieval", CVPR 2021, arXiv:2101.05068. Successor: PCME++ (arXiv:2305.18171), here
`ClosedFormSampledDistanceLoss`.

Images and captions match many to many: an image fits many captions, a vague caption fits many
images. PCME maps each item to a Gaussian N(mu, diag sigma^2), |mu| = 1, in one D-dimensional space.
Two items match with probability

    p = E sigmoid(2 (b - a |z - z'|)),  z ~ N(mu, sigma^2),  z' ~ N(mu', sigma'^2),  a, b learned,

estimated from all J^2 pairs of J samples each (the factor 2 is that of the published code). The
loss is the negative log-likelihood of match / no match over all pairs of a batch. sigma needs no
label: it grows for vague captions and occluded images, and predicts where retrieval fails.

What to copy: any two towers that give (mu, log sigma) + `sample_gaussian` + `MCSoftContrastiveLoss`
+ `pairwise_similarity`; or only the metrics.

    >>> head_i, head_t = GaussianHead(512, 64), GaussianHead(300, 64)      # on any pair of towers
    >>> criterion = MCSoftContrastiveLoss(init_shift=5, init_negative_scale=5, vib_beta=1e-4)
    >>> image, text = head_i(torch.randn(8, 512)), head_t(torch.randn(8, 300))
    >>> samples = sample_gaussian(*image, 7), sample_gaussian(*text, 7)
    >>> loss, parts = criterion(*samples, image[1], text[1])
    >>> loss.backward()
    >>> (mu, l), (nu, m) = ([x.detach() for x in side] for side in (image, text))
    >>> pairwise_similarity(mu, nu, "csd", l, m).shape
    torch.Size([8, 8])

`logsigma` is the log STANDARD DEVIATION everywhere except in the KL term, where the published code
reads the same number as a log variance (`kl_convention`), and in PCME++, whose heads give log
variances. Losses are SUMS over pairs: a learning rate or clipping threshold found at one batch size
does not carry over to another.

Reproduces: on COCO the paper reports the best plausible-match R-Precision (1K: 45.0 / 46.0), with
R@1 68.8 / 54.6.
"""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DISTANCE_EPS = 1e-6                                       # inside the root of every sample distance


# ---------------------------------------------------------------- heads (paper, section 3.2)

class MultiHeadSelfAttention(nn.Module):
    """Attention pooling: softmax_t(tanh(x W1^T) W2^T) weights the T items of x (B, T, d_in).

    Returns pooled (B, n_head, d_in), without the middle axis when n_head is 1, and the weights
    (B, T, n_head). mask (B, T) bool is True where x is padding; a row must keep at least one item.
    """

    def __init__(self, n_head: int, d_in: int, d_hidden: int):
        super().__init__()
        self.n_head = n_head
        self.w_1 = nn.Linear(d_in, d_hidden, bias=False)
        self.w_2 = nn.Linear(d_hidden, n_head, bias=False)
        nn.init.xavier_uniform_(self.w_1.weight)
        nn.init.xavier_uniform_(self.w_2.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.w_2(torch.tanh(self.w_1(x)))
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-1), -math.inf)
        attention = scores.softmax(dim=1)
        pooled = attention.transpose(1, 2) @ x
        return (pooled.squeeze(1) if self.n_head == 1 else pooled), attention


class PIENet(nn.Module):
    """LayerNorm(out + sigmoid(Linear(attention pooling of x))): a global state, refined locally.

    out (B, d_out), x (B, T, d_in) -> out, attention (B, T, K), residual; K = n_embeds > 1 adds an
    axis (B, K, d_out) to out and residual. Not L2-normalised: the encoders do that.
    """

    def __init__(self, n_embeds: int, d_in: int, d_out: int, d_h: int, dropout: float = 0.0):
        super().__init__()
        self.n_embeds = n_embeds
        self.attention = MultiHeadSelfAttention(n_embeds, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_out)

    def forward(self, out: Tensor, x: Tensor,
                pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        pooled, attention = self.attention(x, pad_mask)
        residual = self.dropout(torch.sigmoid(self.fc(pooled)))
        if self.n_embeds > 1:
            out = out.unsqueeze(1)
        return self.layer_norm(out + residual), attention, residual


class UncertaintyModuleImage(nn.Module):
    """logsigma = Linear(attention pooling of x) + Linear(pooled).

    No sigmoid, LayerNorm or normalisation: they would bound the uncertainty.
    """

    def __init__(self, d_in: int, d_out: int, d_h: int):
        super().__init__()
        self.attention = MultiHeadSelfAttention(1, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.fc2 = nn.Linear(d_in, d_out)

    def forward(self, pooled: Tensor, x: Tensor) -> dict[str, Tensor]:
        residual, attention = self.attention(x)
        return {"logsigma": self.fc(residual) + self.fc2(pooled), "attention": attention}


class UncertaintyModuleText(nn.Module):
    """logsigma = Linear(attention pooling of the words) + state of a GRU of its own."""

    def __init__(self, d_in: int, d_out: int, d_h: int, final_state: str = "last_position"):
        super().__init__()
        _check_choice(("last_position", "both_ends"), final_state=final_state)
        self.attention = MultiHeadSelfAttention(1, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.rnn = nn.GRU(d_in, d_out // 2, bidirectional=True, batch_first=True)
        self.final_state = final_state

    def forward(self, x: Tensor, pad_mask: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        residual, attention = self.attention(x, pad_mask)
        state = _sentence_state(self.rnn, x, lengths, self.final_state)
        return {"logsigma": self.fc(residual) + state, "attention": attention}


class GaussianHead(nn.Module):
    """x (B, d_in) -> unit mu (B, d_out) and logsigma (B, d_out), at first near `init_logsigma`."""

    def __init__(self, d_in: int, d_out: int, init_logsigma: float = -3.0):
        super().__init__()
        self.mean = nn.Linear(d_in, d_out)
        self.logsigma = nn.Linear(d_in, d_out)
        nn.init.constant_(self.logsigma.bias, init_logsigma)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.normalize(self.mean(x), dim=-1), self.logsigma(x)


def _xavier_linear(d_in: int, d_out: int) -> nn.Linear:
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sentence_state(rnn: nn.GRU, x: Tensor, lengths: Tensor, final_state: str) -> Tensor:
    """(B, D) state of a bidirectional GRU over right-padded x (B, T, d), without host syncs.

    "last_position" reads both directions at the last word, as the published model does: its
    backward half has seen that one word only. "both_ends" reads it at the first word.
    """
    def run(sequence: Tensor, suffix: str) -> Tensor:
        weights = [getattr(rnn, f"{name}_l0{suffix}")
                   for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        start = sequence.new_zeros(1, len(sequence), rnn.hidden_size)
        return torch.gru(sequence, start, weights, True, 1, 0.0, rnn.training, False, True)[0]

    def at(sequence: Tensor, position: Tensor) -> Tensor:
        return sequence.gather(1, position.unsqueeze(-1).expand(-1, -1, sequence.shape[-1]))

    last = (lengths - 1).unsqueeze(1)
    if final_state == "last_position":
        backward = run(at(x, last), "_reverse")
    else:
        flipped = (last - torch.arange(x.shape[1], device=x.device)).clamp(min=0)
        backward = at(run(at(x, flipped), "_reverse"), last)
    return torch.cat([at(run(x, ""), last), backward], dim=-1).squeeze(1)


# ---------------------------------------------------------------- encoders

class EncoderImage(nn.Module):
    """Gaussians of images on any `backbone`: images -> (B, cnn_dim, H, W), or global (B, cnn_dim).

    Returns a dict: embedding (B, J, D) samples, or mu (B, D) when J = n_samples_inference is 0;
    mu, logsigma, residual (B, D); attention, uncertainty_attention (B, H*W, 1). Parameter names are
    those of the public model.
    """

    def __init__(self, backbone: nn.Module, cnn_dim: int, embed_dim: int,
                 n_samples_inference: int = 7):
        super().__init__()
        self.n_samples_inference = n_samples_inference
        self.cnn = backbone
        self.fc = nn.Linear(cnn_dim, embed_dim)
        self.pie_net = PIENet(1, cnn_dim, embed_dim, cnn_dim // 2)
        self.uncertain_net = UncertaintyModuleImage(cnn_dim, embed_dim, cnn_dim // 2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None,
                num_samples: int | None = None) -> dict[str, Tensor]:
        features, width = self.cnn(images), self.fc.in_features
        if features.ndim not in (2, 4) or features.shape[1] != width:
            raise ValueError(f"backbone must give (B, {width}, H, W) or (B, {width}), "
                             f"got {tuple(features.shape)}")
        local = features.reshape(*features.shape[:2], -1).transpose(1, 2)
        pooled = local.mean(1)
        mean = self.pie_net(self.fc(pooled), local)
        j = self.n_samples_inference if num_samples is None else num_samples
        return _encoded(mean, self.uncertain_net(pooled, local), j, generator)


class EncoderText(nn.Module):
    """Gaussians of token sequences (B, T), padded on the right, lengths (B,) int64 in any order.

    Two bidirectional GRUs (mean and uncertainty) give the sentence states; attention reads the word
    vectors. Returns the dict of `EncoderImage`, attention over the T words.
    final_state: "last_position" (published) or "both_ends", see `_sentence_state`.
    """

    def __init__(self, vocab_size: int, word_dim: int = 300, embed_dim: int = 1024,
                 final_state: str = "last_position", n_samples_inference: int = 7):
        super().__init__()
        if embed_dim % 2:
            raise ValueError(f"embed_dim must be even (two GRU directions), got {embed_dim}")
        self.n_samples_inference, self.final_state = n_samples_inference, final_state
        self.embed = nn.Embedding(vocab_size, word_dim)
        self.rnn = nn.GRU(word_dim, embed_dim // 2, bidirectional=True, batch_first=True)
        self.pie_net = PIENet(1, word_dim, embed_dim, word_dim // 2)
        self.uncertain_net = UncertaintyModuleText(word_dim, embed_dim, word_dim // 2, final_state)

    def forward(self, tokens: Tensor, lengths: Tensor, generator: torch.Generator | None = None,
                num_samples: int | None = None) -> dict[str, Tensor]:
        lengths = _check_lengths(tokens, lengths)
        words = self.embed(tokens)
        pad_mask = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
        state = _sentence_state(self.rnn, words, lengths, self.final_state)
        mean = self.pie_net(state, words, pad_mask)
        j = self.n_samples_inference if num_samples is None else num_samples
        return _encoded(mean, self.uncertain_net(words, pad_mask, lengths), j, generator)


def _encoded(mean: tuple, uncertain: dict, num_samples: int, generator) -> dict[str, Tensor]:
    """What an encoder returns, from (out, attention, residual) and {"logsigma", "attention"}."""
    mu, logsigma = F.normalize(mean[0], dim=-1), uncertain["logsigma"]
    embedding = sample_gaussian(mu, logsigma, num_samples, generator) if num_samples else mu
    return {"embedding": embedding, "mu": mu, "logsigma": logsigma, "attention": mean[1],
            "residual": mean[2], "uncertainty_attention": uncertain["attention"]}


def _check_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise ValueError(f"tokens must be (B, T) and lengths (B,), got {tuple(tokens.shape)} "
                         f"and {tuple(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be in 1..{tokens.shape[1]}, got {lengths.min().item()}.."
                         f"{lengths.max().item()}")
    return lengths.to(tokens.device, torch.int64)


def _check_choice(accepted: Sequence[str], **argument: str) -> None:
    (name, value), = argument.items()
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


class PCME(nn.Module):
    """An image tower and a text tower: encoders as above, or modules that give (mu, logsigma)."""

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.img_enc, self.txt_enc = image_encoder, text_encoder

    def encode_image(self, images: Tensor, **options) -> dict[str, Tensor]:
        return self._encode(self.img_enc, (images,), **options)

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, **options) -> dict:
        return self._encode(self.txt_enc, (tokens, lengths), **options)

    @staticmethod
    def _encode(encoder, inputs, generator=None, num_samples=None):
        if isinstance(encoder, (EncoderImage, EncoderText)):
            return encoder(*inputs, generator=generator, num_samples=num_samples)
        mu, logsigma = encoder(inputs[0])
        return _encoded((mu, None, None), {"logsigma": logsigma, "attention": None},
                        7 if num_samples is None else num_samples, generator)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor | None = None,
                **options) -> dict[str, Tensor]:
        """{image,caption}_{features,attentions,residuals,logsigma,logsigma_att,mu}.

        options: generator of the samples, num_samples (default: the encoders' own).
        """
        names = {"features": "embedding", "attentions": "attention", "residuals": "residual",
                 "logsigma": "logsigma", "logsigma_att": "uncertainty_attention", "mu": "mu"}
        sides = {"image": self.encode_image(images, **options),
                 "caption": self.encode_text(tokens, lengths, **options)}
        return {f"{side}_{name}": out[key] for side, out in sides.items()
                for name, key in names.items()}

    def load_official(self, state_dict: dict) -> None:
        """Load a checkpoint of the public implementation (its dict, or the entry "model" alone).

        All names and shapes must fit; batch norm's step counters may be missing.
        """
        state = {name.removeprefix("module."): value
                 for name, value in state_dict.get("model", state_dict).items()}
        own, shape = self.state_dict(), lambda x: "missing" if x is None else tuple(x.shape)
        wrong = [f"{name} is {shape(state.get(name))} in the file, {shape(own.get(name))} here"
                 for name in sorted(own.keys() | state.keys())
                 if shape(state.get(name)) != shape(own.get(name))
                 and (name in state or not name.endswith("num_batches_tracked"))]
        if wrong:
            raise ValueError(f"state_dict does not fit: {'; '.join(wrong[:4])} ({len(wrong)})")
        self.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- sampling

def sample_gaussian(mu: Tensor, logsigma: Tensor, num_samples: int,
                    generator: torch.Generator | None = None, antithetic: bool = False,
                    eps: Tensor | None = None) -> Tensor:
    """z = mu + exp(logsigma) * eps (paper, section 3.2): (B, D) -> (B, J, D), not normalised.

    eps (B, J, D) replaces the draw; antithetic=True draws pairs eps, -eps. Half precision gives
    float32 samples.
    """
    if mu.ndim != 2 or mu.shape != logsigma.shape:
        raise ValueError(f"mu and logsigma must both be (B, D), got {tuple(mu.shape)} and "
                         f"{tuple(logsigma.shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    mu, logsigma = _wide(mu), _wide(logsigma)
    shape = (len(mu), num_samples, mu.shape[1])
    if eps is None:
        drawn = -(-num_samples // 2) if antithetic else num_samples
        eps = torch.randn(shape[0], drawn, shape[2], generator=generator, device=mu.device,
                          dtype=mu.dtype)
        if antithetic:
            eps = torch.cat([eps, -eps], dim=1)[:, :num_samples]
    elif eps.shape != shape:
        raise ValueError(f"eps must be {shape}, got {tuple(eps.shape)}")
    return torch.addcmul(mu.unsqueeze(1), logsigma.exp().unsqueeze(1), eps.to(mu))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------- losses

def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m): |x - y|^2 by one matrix product."""
    product = torch.addmm(y.square().sum(-1), x, y.T, alpha=-2)
    return (product + x.square().sum(-1, keepdim=True)).clamp(min=0)


def _distances(q: Tensor, g: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m): sqrt(|q - g|^2 + eps)."""
    if torch.is_grad_enabled():
        return (_squared(q, g) + DISTANCE_EPS).sqrt()
    product = torch.addmm(g.square().sum(-1).add_(DISTANCE_EPS), q, g.T, alpha=-2)      # in place
    return product.add_(q.square().sum(-1, keepdim=True)).clamp_(min=DISTANCE_EPS).sqrt_()


def _log_mean_sigmoid(logits: Tensor) -> Tensor:
    """log of the mean over axes 1 and 3 of sigmoid(logits), never forming the probability."""
    count = logits.shape[1] * logits.shape[3]
    return torch.logsumexp(F.logsigmoid(logits), dim=(1, 3)) - math.log(count)


def _check(ndim: int, **tensors: Tensor) -> None:
    """Non-empty (N, D) or (N, J, D) tensors with the same D."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != ndim or 0 in x.shape:
            kind = "(N, J, D) samples" if ndim == 3 else "(N, D)"
            raise ValueError(f"{name} must be non-empty {kind}, got {tuple(x.shape)}")
    if len({x.shape[-1] for x in tensors.values()}) > 1:
        raise ValueError(f"{' and '.join(tensors)} must have the same D, got "
                         f"{[x.shape[-1] for x in tensors.values()]}")


def _check_matched(matched: Tensor | None, images: Tensor, captions: Tensor) -> Tensor:
    """(Ni, Nc) bool for the diagonal and for hard labels, floats in [0, 1] for soft ones."""
    shape = (len(images), len(captions))
    if matched is None:
        if shape[0] != shape[1]:
            raise ValueError(f"matched is needed for {shape[0]} images and {shape[1]} captions")
        return torch.eye(shape[0], dtype=torch.bool, device=images.device)
    matched = torch.as_tensor(matched, device=images.device)
    if matched.shape != shape:
        raise ValueError(f"matched must be {shape}, got {tuple(matched.shape)}")
    if matched.dtype == torch.bool:
        return matched
    if not ((matched >= 0) & (matched <= 1)).all():
        raise ValueError("matched must be in [0, 1]")
    return matched.to(images.dtype)


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), float(value)))


def _vib(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of every item and dimension."""
    return -0.5 * (1 + log_var - mean.square() - log_var.exp())


class MCSoftContrastiveLoss(nn.Module):
    r"""The soft contrastive loss over all image-caption pairs of a batch, estimated from samples.

    For samples z of the image and z' of the caption, with s = b - a |z - z'| (equations 1-4):

        nll(match)    = -log mean_{J^2} sigmoid( 2 s)     loss = 2 sum_pairs nll
        nll(no match) = -log mean_{J^2} sigmoid(-2 s)            + uniform_lambda * U
                                                                 + vib_beta * (KL_i + KL_c)

    U = log mean_{p<q} exp(-2 |x_p - x_q|^2) over (at most 128 drawn rows of) all samples spreads
    them out. KL, per item and dimension, keeps sigma from collapsing: "official" -(1 + l - m^2 -
    e^l) / 2 with l = logsigma read as a log variance and m the mean of the samples; "std" the exact
    -(1 + 2 l - mu^2 - e^(2 l)) / 2.

    a (`negative_scale`) and b (`shift`) are unconstrained: an a that falls to 0 is a failed run.
    block: images per block; the pair matrix of a block is recomputed in the backward pass, which
    bounds the memory to O(block * J * Nc * J). deterministic_weight adds InfoNCE on the means,
    which helps training from scratch. Distances are never computed in half precision.
    """

    def __init__(self, init_shift: float = 15, init_negative_scale: float = 15,
                 num_samples: int = 7, uniform_lambda: float = 0.0, vib_beta: float = 0.0,
                 reduction: str = "sum", kl_convention: str = "official",
                 block: int | None = None, *, deterministic_weight: float = 0.0):
        super().__init__()
        _check_choice(("sum", "mean", "none"), reduction=reduction)
        _check_choice(("official", "std"), kl_convention=kl_convention)
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        _check_weights(uniform_lambda=uniform_lambda, vib_beta=vib_beta,
                       deterministic_weight=deterministic_weight)
        self.shift, self.negative_scale = _scalar(init_shift), _scalar(init_negative_scale)
        self.num_samples, self.uniform_lambda, self.vib_beta = num_samples, uniform_lambda, vib_beta
        self.reduction, self.kl_convention, self.block = reduction, kl_convention, block
        self.deterministic_weight = deterministic_weight

    def forward(self, image_samples: Tensor, caption_samples: Tensor,
                image_logsigma: Tensor | None = None, caption_logsigma: Tensor | None = None,
                matched: Tensor | None = None, uniform_rows: Tensor | None = None,
                generator: torch.Generator | None = None, *, image_mu: Tensor | None = None,
                caption_mu: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples (Ni, J, D), (Nc, J, D) -> loss and its parts as detached 0-d tensors.

        matched (Ni, Nc): True, 1 or a degree in [0, 1] where the pair matches; None: the diagonal.
        """
        _check(3, image_samples=image_samples, caption_samples=caption_samples)
        images, captions = _wide(image_samples), _wide(caption_samples)
        matched = _check_matched(matched, images, captions)
        with torch.autocast(images.device.type, enabled=False):
            if self.block is None or self.block >= len(images):
                nll, positive = self._nll(images, captions, matched)
            else:
                parts = [checkpoint(self._nll, i, captions, m, use_reentrant=False)
                         for i, m in zip(images.split(self.block), matched.split(self.block))]
                nll, positive = map(torch.cat, zip(*parts))
            total, positive = nll.sum(), positive.sum()
            uniform = vib = deterministic = images.new_zeros(())
            if self.uniform_lambda:
                uniform = self._uniformity(images, captions, uniform_rows, generator)
            if self.vib_beta:
                vib = (self._kl(images, image_logsigma, image_mu, "image")
                       + self._kl(captions, caption_logsigma, caption_mu, "caption"))
            if self.deterministic_weight:
                means = [z.mean(1) if mu is None else mu
                         for z, mu in ((images, image_mu), (captions, caption_mu))]
                deterministic = _info_nce(_cosines(*means) / 0.07, matched)
            extra = (self.uniform_lambda * uniform + self.vib_beta * vib
                     + self.deterministic_weight * deterministic)
            loss = {"sum": 2 * total + extra, "mean": 2 * total / nll.numel() + extra,
                    "none": 2 * nll}[self.reduction]
        values = {"loss": loss, "uniform_loss": uniform, "vib_loss": vib, "shift": self.shift[0],
                  "negative_scale": self.negative_scale[0]}
        for way in ("i2t", "t2i"):                            # equal by symmetry; published names
            values |= {f"{way}_loss": total, f"{way}_pos_loss": positive,
                       f"{way}_neg_loss": total - positive}
        return loss, {name: value.detach().clone() for name, value in values.items()}

    def _nll(self, images: Tensor, captions: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        """(Ni, Nc) negative log-likelihoods, and the share of each that is due to matching."""
        s = self._logits(images, captions)
        if matched.dtype == torch.bool:                      # one log-likelihood per pair is enough
            sign = torch.where(matched, 1.0, -1.0).to(s.dtype)[:, None, :, None]
            nll = -_log_mean_sigmoid(sign * s)
            return nll, nll * matched
        positive = -matched * _log_mean_sigmoid(s)
        return positive - (1 - matched) * _log_mean_sigmoid(-s), positive

    def _logits(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, Ng, J') of 2 (b - a d)."""
        d = _distances(q.flatten(0, 1), g.flatten(0, 1))
        shift, scale = self.shift.to(d.dtype), self.negative_scale.to(d.dtype)
        return (2 * (shift - scale * d)).view(*q.shape[:2], *g.shape[:2])

    @staticmethod
    def _uniformity(images: Tensor, captions: Tensor, rows: Tensor | None, generator) -> Tensor:
        x = torch.cat([images.flatten(0, 1), captions.flatten(0, 1)])
        if rows is None and len(x) > 128:                     # the published rule: with replacement
            device = x.device if generator is None else generator.device
            rows = torch.randint(len(x), (128,), generator=generator, device=device)
        if rows is not None:
            x = x[torch.as_tensor(rows, device=x.device)]
        if len(x) < 2:
            raise ValueError(f"the uniformity term needs at least 2 rows, got {len(x)}")
        upper = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device).triu(1)
        squared = _squared(x, x)[upper]                     # no root: no NaN gradient at duplicates
        return torch.logsumexp(-2 * squared, 0) - math.log(len(squared))

    def _kl(self, samples: Tensor, logsigma: Tensor | None, mu: Tensor | None, side: str) -> Tensor:
        expected = (samples.shape[0], samples.shape[2])
        if logsigma is None or logsigma.shape != expected:
            raise ValueError(f"{side}_logsigma must be {expected} when vib_beta is not 0, "
                             f"got {None if logsigma is None else tuple(logsigma.shape)}")
        logsigma, mean = logsigma.to(samples.dtype), samples.mean(1)
        if self.kl_convention == "std":
            logsigma, mean = 2 * logsigma, mean if mu is None else mu.to(samples.dtype)
        return _vib(mean, logsigma).sum()

    def log_match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) log match probability: ranks without saturating."""
        _check(3, q=q, g=g)
        return _log_mean_sigmoid(self._logits(_wide(q), _wide(g)))

    def match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) match probability, differentiable."""
        _check(3, q=q, g=g)
        return torch.sigmoid(self._logits(_wide(q), _wide(g))).mean((1, 3))


class ClosedFormSampledDistanceLoss(nn.Module):
    """PCME++: cross-entropy over all pairs of b - a (|mu - mu'|^2 + sum sigma^2 + sum sigma'^2).

    smoothness_alpha weighs the same loss with pseudo-positives: pairs scored at least as high as
    their row's own match. No samples are drawn. The arguments are log VARIANCES.
    """

    def __init__(self, init_shift: float = 5, init_negative_scale: float = 5, vib_beta: float = 0.0,
                 smoothness_alpha: float = 0.0):
        super().__init__()
        _check_weights(vib_beta=vib_beta, smoothness_alpha=smoothness_alpha)
        self.shift, self.negative_scale = _scalar(init_shift), _scalar(init_negative_scale)
        self.vib_beta, self.smoothness_alpha = vib_beta, smoothness_alpha

    def forward(self, image_mean: Tensor, caption_mean: Tensor, image_log_var: Tensor,
                caption_log_var: Tensor,
                matched: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(Ni, D), (Nc, D) -> loss (mean over pairs, times 2) and its parts as detached tensors."""
        _check(2, image_mean=image_mean, caption_mean=caption_mean, image_log_var=image_log_var,
               caption_log_var=caption_log_var)
        for name, mean, log_var in (("image", image_mean, image_log_var),
                                    ("caption", caption_mean, caption_log_var)):
            if mean.shape != log_var.shape:
                raise ValueError(f"{name}_log_var must be {tuple(mean.shape)} as {name}_mean, "
                                 f"got {tuple(log_var.shape)}")
        images, captions = _wide(image_mean), _wide(caption_mean)
        image_l, caption_l = _wide(image_log_var), _wide(caption_log_var)
        matched = _check_matched(matched, images, captions).to(images.dtype)
        with torch.autocast(images.device.type, enabled=False):
            spread = image_l.exp().sum(1, keepdim=True) + caption_l.exp().sum(1)
            logits = self.shift - self.negative_scale * (_squared(images, captions) + spread)
            loss = 2 * F.binary_cross_entropy_with_logits(logits, matched)
            pseudo, vib = torch.zeros((), dtype=torch.int64), images.new_zeros(())
            ways = ((logits, matched), (logits.T, matched.T)) if self.smoothness_alpha else ()
            for way, target in ways:
                best, index = target.max(dim=1, keepdim=True)
                above = way >= way.gather(1, index)
                smooth = F.binary_cross_entropy_with_logits(way, torch.where(above, best, target))
                loss = loss + self.smoothness_alpha * smooth
                pseudo = pseudo + above.sum().cpu() - len(target)
            if self.vib_beta:                             # left out where it explodes, as published
                vib = _vib(images, image_l).mean() + _vib(captions, caption_l).mean()
                loss = loss + self.vib_beta * torch.where(vib > 1e4, 0.0, vib)
        parts = {"loss": loss, "n_pseudo_positives": pseudo, "vib_loss": vib,
                 "shift": self.shift[0], "negative_scale": self.negative_scale[0]}
        return loss, {name: value.detach().clone() for name, value in parts.items()}


class _CosineLoss(nn.Module):
    """Baselines on the cosines of the mean samples, with the call of `MCSoftContrastiveLoss`."""

    def forward(self, image_samples: Tensor, caption_samples: Tensor, image_logsigma=None,
                caption_logsigma=None, matched: Tensor | None = None,
                **unused) -> tuple[Tensor, dict[str, Tensor]]:
        _check(3, image_samples=image_samples, caption_samples=caption_samples)
        images, captions = (_wide(x).mean(1) for x in (image_samples, caption_samples))
        parts = self.parts(_cosines(images, captions), _check_matched(matched, images, captions))
        return parts["loss"], {name: value.detach() for name, value in parts.items()}


class TripletLoss(_CosineLoss):
    """Hinge max(0, margin + negative - positive) for every match, in both directions.

    max_violation=True takes the hardest negative of each (VSE++), False sums over all (VSE0).
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = True):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def parts(self, scores: Tensor, matched: Tensor) -> dict[str, Tensor]:
        parts = {}
        for way, s, m in (("i2t", scores, matched > 0), ("t2i", scores.T, matched.T > 0)):
            row, column = m.nonzero(as_tuple=True)
            cost = (self.margin + s[row] - s[row, column, None]).clamp(min=0).masked_fill(m[row], 0)
            parts[f"{way}_loss"] = (cost.amax(1) if self.max_violation else cost).sum()
        return {**parts, "loss": parts["i2t_loss"] + parts["t2i_loss"]}


class InfoNCELoss(_CosineLoss):
    """Cross-entropy over the batch in both directions with a learned temperature."""

    def __init__(self, init_temperature: float = 0.07):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(init_temperature)))

    def parts(self, scores: Tensor, matched: Tensor) -> dict[str, Tensor]:
        return {"loss": _info_nce(self.log_scale.exp() * scores, matched),
                "temperature": (-self.log_scale).exp()}


def _cosines(images: Tensor, captions: Tensor) -> Tensor:
    return F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T


def _info_nce(logits: Tensor, matched: Tensor) -> Tensor:
    loss = 0.0
    for way, target in ((logits, matched), (logits.T, matched.T)):
        target = target.to(way.dtype)
        target = target / target.sum(1, keepdim=True).clamp(min=1e-12)
        loss = loss - (target * way.log_softmax(1)).sum(1).mean() / 2
    return loss


# ---------------------------------------------------------------- similarities, larger = closer

def _cross(m1, v1, m2, v2):
    """sum ((m1 - m2)^2 + v1) / v2 for all pairs, as one matrix product."""
    left, right = torch.cat([m1.square() + v1, m1], 1), torch.cat([1 / v2, -2 * m2 / v2], 1)
    return left @ right.T + (m2.square() / v2).sum(1)


def _kl(m1, l1, m2, l2):
    """-KL(first || second)."""
    half = 0.5 * (_cross(m1, (2 * l1).exp(), m2, (2 * l2).exp()) - m1.shape[1])
    return l1.sum(1, keepdim=True) - l2.sum(1) - half


def _kl_official(m1, l1, m2, l2):
    """As published: the sign of the log term is wrong, so this is no divergence."""
    cross = _cross(m1, (2 * l1).exp(), m2, (2 * l2).exp())
    return -cross - 2 * (l1.sum(1, keepdim=True) - l2.sum(1))


def _js(m1, l1, m2, l2):
    v1, v2 = (2 * l1).exp(), (2 * l2).exp()
    return -_cross(m1, v1, m2, v2) - _cross(m2, v2, m1, v1).T


def _elk(m1, l1, m2, l2):
    v = (2 * l1).exp()[:, None] + (2 * l2).exp()
    return -0.5 * ((m1[:, None] - m2).square() / v + v.log()).sum(-1)


def _bhattacharyya(m1, l1, m2, l2):
    v = (2 * l1).exp()[:, None] + (2 * l2).exp()
    logs = 0.5 * ((v / 2).log() - l1[:, None] - l2)
    return -((m1[:, None] - m2).square() / (4 * v) + logs).sum(-1)


def _csd(m1, l1, m2, l2):
    return -(_squared(m1, m2) + (2 * l1).exp().sum(1, keepdim=True) + (2 * l2).exp().sum(1))


def _moment(m1, l1, m2, l2, shift, scale):
    """E sigmoid(2 (b - a |delta|)), delta ~ N(m1 - m2, v), v = v1 + v2, without samples.

    |delta|^2 is taken for a scaled chi-square: its mean m = sum (d^2 + v) and its variance s2 =
    sum (2 v^2 + 4 d^2 v) are matrix products, and with k = 2 m^2 / s2 degrees of freedom it is a
    cubed Gaussian (Wilson-Hilferty), averaged here at 16 Gauss-Hermite nodes.
    """
    v1, v2 = (2 * l1).exp(), (2 * l2).exp()
    mean = -_csd(m1, l1, m2, l2)
    left = torch.cat([4 * m1.square(), -8 * m1 * v1, -8 * m1, 4 * v1], 1)
    right = torch.cat([v2, m2, m2 * v2, m2.square() + v2], 1)
    variance = left @ right.T
    variance += (2 * v1.square() + 4 * m1.square() * v1).sum(1, keepdim=True)
    variance += (2 * v2.square() + 4 * m2.square() * v2).sum(1)
    tiny = torch.finfo(mean.dtype).tiny
    h = variance.clamp(min=0) / (9 * mean.square()).clamp(min=tiny)                  # 2 / (9 k)
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    score = torch.zeros_like(mean)
    for x, weight in zip(nodes.tolist(), (weights / weights.sum()).tolist()):
        squared = mean * (1 - h + x * h.sqrt()).clamp(min=0) ** 3
        score += weight * torch.sigmoid(2 * (shift - scale * (squared + DISTANCE_EPS).sqrt()))
    return score


SAMPLED = {                                                   # of logits (n, J, m, J')
    "matching_prob": lambda s: s.sigmoid_().mean((1, 3)),
    "log_matching_prob": _log_mean_sigmoid,
}
POINTS = {                                                    # mu (n, D), mu (m, D)
    "mean": lambda q, g: q @ g.T,
    "l2": lambda q, g: -_squared(q, g),
    "min": lambda q, g: -(q[:, None] - g).square().amin(-1),
    "max": lambda q, g: -(q[:, None] - g).square().amax(-1),
}
GAUSSIANS = {                                             # mu, logsigma (n, D), mu, logsigma (m, D)
    "wasserstein": lambda m1, l1, m2, l2: -_squared(torch.cat([m1, l1.exp()], 1),
                                                    torch.cat([m2, l2.exp()], 1)),
    "elk": _elk,
    "bhattacharyya": _bhattacharyya,
    "kl": _kl,
    "reverse_kl": lambda m1, l1, m2, l2: _kl(m2, l2, m1, l1).T,
    "kl_official": _kl_official,
    "reverse_kl_official": lambda m1, l1, m2, l2: _kl_official(m2, l2, m1, l1).T,
    "js": _js,
    "csd": _csd,
    "match_prob_moment": _moment,
}
METHODS = (*SAMPLED, "matmul", *POINTS, *GAUSSIANS)
ELEMENTWISE = ("min", "max", "elk", "bhattacharyya")          # need (n, m, D) values


@torch.no_grad()
def pairwise_similarity(q: Tensor, g: Tensor, method: str = "matching_prob",
                        q_logsigma: Tensor | None = None, g_logsigma: Tensor | None = None,
                        shift: float = 15.0, negative_scale: float = 15.0, block: int | None = None,
                        out: Tensor | None = None, device=None, dtype=None) -> Tensor:
    """(Nq, Ng) similarities, larger = more similar, in tiles of at most `block` x 4 `block` items.

    matching_prob, log_matching_prob (ranks the same, never saturates), matmul (sum of the products
    of all sample pairs): q, g are samples (N, J, D). mean (mu . mu'), l2, min, max (over
    dimensions): q, g are mu (N, D). The others take mu and log standard deviations (N, D):
    wasserstein (squared), elk (log expected likelihood), bhattacharyya, kl = -KL(query || gallery),
    reverse_kl, js (= -(2 Jeffreys + 2 D)), csd (PCME++'s expected squared distance),
    match_prob_moment (the match probability at J -> infinity, without samples); kl_official and
    reverse_kl_official have the sign error of the public code.

    Computed on `device` in `dtype` (default: those of q; half precision is scored in float32);
    `out` (Nq, Ng) is filled.
    """
    _check_choice(METHODS, method=method)
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    q, g = torch.as_tensor(q), torch.as_tensor(g)
    _check(3 if method in SAMPLED or method == "matmul" else 2, q=q, g=g)
    queries, gallery = [q], [g]
    if method in GAUSSIANS:
        for name, side, logsigma in (("q", queries, q_logsigma), ("g", gallery, g_logsigma)):
            given = None if logsigma is None else tuple(logsigma.shape)
            if given != tuple(side[0].shape):
                raise ValueError(f"{name}_logsigma must be {tuple(side[0].shape)} for {method}, "
                                 f"got {given}")
            side.append(torch.as_tensor(logsigma))
    device, dtype = device or q.device, dtype or _wide(q).dtype
    if out is None:
        out = torch.empty(len(q), len(g), dtype=dtype, device=device)
    elif tuple(out.shape) != (len(q), len(g)):
        raise ValueError(f"out must be ({len(q)}, {len(g)}), got {tuple(out.shape)}")
    shift, scale = float(shift), float(negative_scale)

    def tile(left: list[Tensor], right: list[Tensor]) -> Tensor:
        if method in SAMPLED:
            a, b = left[0], right[0]
            s = _distances(a.flatten(0, 1), b.flatten(0, 1)).mul_(-2 * scale).add_(2 * shift)
            return SAMPLED[method](s.view(*a.shape[:2], *b.shape[:2]))
        if method == "matmul":
            return left[0].sum(1) @ right[0].sum(1).T
        options = (shift, scale) if method == "match_prob_moment" else ()
        return {**POINTS, **GAUSSIANS}[method](*left, *right, *options)

    if block is None:                                         # tiles of a few MB
        block = 64 if method in SAMPLED else 32 if method in ELEMENTWISE else 1024
    for row, column in itertools.product(range(0, len(q), block), range(0, len(g), 4 * block)):
        rows, columns = slice(row, row + block), slice(column, column + 4 * block)
        left, right = ([x[part].to(device, dtype) for x in side]
                       for side, part in ((queries, rows), (gallery, columns)))
        out[rows, columns] = tile(left, right).to(out)
    return out


# ---------------------------------------------------------------- retrieval metrics

ROWS = 64                                 # queries ranked at once: bounds memory, fits the cache


def _similarity(sim) -> Tensor:
    sim = _wide(torch.as_tensor(sim).detach())
    if sim.ndim != 2 or 0 in sim.shape:
        raise ValueError(f"sim must be non-empty (queries, gallery), got {tuple(sim.shape)}")
    if not all(torch.isfinite(part).all() for part in sim.split(ROWS)):
        raise ValueError("sim holds NaN or infinite values; they cannot be ranked")
    return sim


def _aligned(sim: Tensor, **rows_and_columns) -> list[Tensor]:
    """Two arrays as tensors, one with an entry per row of sim and one with an entry per column."""
    arrays = [torch.as_tensor(x, device=sim.device) for x in rows_and_columns.values()]
    for name, array, count in zip(rows_and_columns, arrays, sim.shape):
        if array.shape != (count,):
            raise ValueError(f"{name} must be ({count},) for sim {tuple(sim.shape)}, "
                             f"got {tuple(array.shape)}")
    return arrays


def _positives(sim: Tensor, positives) -> Tensor:
    positives = torch.as_tensor(positives, device=sim.device)
    if positives.shape != sim.shape:
        raise ValueError(f"positives must have the shape of sim, {tuple(sim.shape)}, "
                         f"got {tuple(positives.shape)}")
    return positives.bool()


def _with_positives(counts: Tensor, ignore_empty: bool = False) -> Tensor:
    """Indices of the queries to evaluate: those with a positive in the gallery."""
    empty = (counts == 0).nonzero().flatten()
    if len(empty) and (not ignore_empty or len(empty) == len(counts)):
        raise ValueError(f"{len(empty)} queries have no positive in the gallery, "
                         f"first {empty[:5].tolist()}")
    return counts.nonzero().flatten()


def _ranked(sim: Tensor, values: Tensor) -> Tensor:
    """`values` (queries, gallery) by falling similarity; ties keep the gallery order."""
    return values.gather(1, sim.sort(dim=1, descending=True, stable=True).indices)


def _best_ranks(sim: Tensor, positives_of: Callable[[slice], Tensor]) -> np.ndarray:
    """0-based rank of the best positive of each query, by counting, without a sort."""
    ranks = []
    for row in range(0, len(sim), ROWS):
        part, positives = sim[row:row + ROWS], positives_of(slice(row, row + ROWS))
        _with_positives(positives.sum(1))
        best = part.masked_fill(~positives, -math.inf).amax(1, keepdim=True)
        tied = part == best
        first = (tied & positives).to(torch.uint8).argmax(1, keepdim=True)
        before = torch.arange(part.shape[1], device=part.device) < first
        ranks.append(((part > best) | (tied & before)).sum(1))
    return torch.cat(ranks).cpu().numpy()


def _rank_summary(ranks: np.ndarray, scale: float) -> dict[str, float]:
    recalls = {f"recall_{k}": scale * float((ranks < k).mean()) for k in (1, 5, 10)}
    return {**recalls, "rsum": sum(recalls.values()), "medr": float(np.floor(np.median(ranks)) + 1),
            "meanr": float(ranks.mean() + 1)}


def _precision_at_r(sim: Tensor, positives: Tensor,
                    ignore_empty: bool = False) -> tuple[float, float]:
    """R-Precision and mAP@R, means over the queries; R = number of a query's positives."""
    counts = positives.sum(1)
    r_precision, average = [], []
    for part in _with_positives(counts, ignore_empty).split(ROWS):
        r = counts[part]
        hits = _ranked(sim[part], positives[part])[:, :int(r.max())]
        place = torch.arange(1, hits.shape[1] + 1, device=sim.device)
        hits = (hits & (place <= r[:, None])).double()
        r_precision.append(hits.sum(1) / r)
        average.append((hits.cumsum(1) / place * hits).sum(1) / r)
    return torch.cat(r_precision).mean().item(), torch.cat(average).mean().item()


def recall_at_k(sim, positives, k: int) -> float:
    """Fraction of queries with a positive among the k most similar; sim, positives (Nq, Ng).

    Equal similarities rank by gallery index, here and in all metrics.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    sim = _similarity(sim)
    positives = _positives(sim, positives)
    return float((_best_ranks(sim, positives.__getitem__) < k).mean())


def r_precision(sim, positives, ignore_empty: bool = False) -> float:
    """Mean fraction of positives among the first R, R = number of the query's positives."""
    sim = _similarity(sim)
    return _precision_at_r(sim, _positives(sim, positives), ignore_empty)[0]


def map_at_r(sim, positives, ignore_empty: bool = False) -> float:
    """mAP@R: mean over queries of (1 / R) sum_{r <= R} precision@r * relevant_r."""
    sim = _similarity(sim)
    return _precision_at_r(sim, _positives(sim, positives), ignore_empty)[1]


def eccv_metrics(sim, positives) -> dict[str, float]:
    """The metrics of ECCV Caption (arXiv:2204.03359) for one direction, fractions."""
    sim = _similarity(sim)
    precision, average = _precision_at_r(sim, _positives(sim, positives))
    return {"eccv_map_at_r": average, "eccv_rprecision": precision,
            "eccv_r1": recall_at_k(sim, positives, 1)}


def _folds(n: int, folds: int) -> list[slice]:
    if folds < 1 or n % folds:
        raise ValueError(f"folds must divide the number of images, {n}, got {folds}")
    return [slice(start, start + n // folds) for start in range(0, n, n // folds)]


def coco_recalls(sim, image_ids, caption_image_ids, folds: int | None = 5) -> dict[str, float]:
    """Recalls in PERCENT of sim (images, captions) in both directions.

    {i2t,t2i}_{recall_1,recall_5,recall_10,rsum,medr,meanr}; with folds also nfold_...: means over
    consecutive blocks of images, each with its own captions ("1K" is 5 folds of COCO's 5,000
    images).
    """
    sim = _similarity(sim)
    images, captions = _aligned(sim, image_ids=image_ids, caption_image_ids=caption_image_ids)

    def both(sim, images, captions):
        i2t = _best_ranks(sim, lambda rows: images[rows, None] == captions)
        t2i = _best_ranks(sim.T, lambda rows: captions[rows, None] == images)
        return {f"{way}_{name}": value for way, ranks in (("i2t", i2t), ("t2i", t2i))
                for name, value in _rank_summary(ranks, 100.0).items()}

    result = both(sim, images, captions)
    if folds is not None:
        parts = []
        for rows in _folds(len(sim), folds):
            columns = torch.isin(captions, images[rows]).nonzero().flatten()
            parts.append(both(sim[rows][:, columns], images[rows], captions[columns]))
        result |= {f"nfold_{name}": float(np.mean([part[name] for part in parts]))
                   for name in parts[0]}
    return result


def cub_metrics(sim, q_labels, g_labels, percent: bool = False) -> dict[str, float]:
    """One direction where all gallery items of the query's class are positives, as fractions.

    recall_{1,5,10}, rsum, precision_{5,10,50,100} (divided by k even when the gallery is shorter),
    r_precision, map_r, medr, meanr; percent=True scales all but the last two.
    """
    sim = _similarity(sim)
    q, g = _aligned(sim, q_labels=q_labels, g_labels=g_labels)
    scale, positives, cuts = 100.0 if percent else 1.0, q[:, None] == g, (5, 10, 50, 100)
    result = _rank_summary(_best_ranks(sim, positives.__getitem__), scale)
    hits = np.zeros(len(cuts))
    for s, p in zip(sim.split(ROWS), positives.split(ROWS)):
        top = _ranked(s, p)
        hits += [top[:, :k].sum().item() for k in cuts]
    result |= {f"precision_{k}": scale * float(h) / k / len(sim) for k, h in zip(cuts, hits)}
    precision, average = _precision_at_r(sim, positives)
    return {**result, "r_precision": scale * precision, "map_r": scale * average}


def plausible_match_codes(instances: dict | list,
                          image_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """COCO instance annotations -> codes (Ni, 90) uint8, bit category_id - 1; annotated (Ni,) bool.

    instances: the JSON dict or its "annotations"; an image without any instance is not annotated.
    """
    row = {int(image): index for index, image in enumerate(image_ids)}
    codes = np.zeros((len(row), 90), dtype=np.uint8)
    for item in instances["annotations"] if isinstance(instances, dict) else instances:
        if item["image_id"] in row:
            if not 1 <= item["category_id"] <= 90:
                raise ValueError(f"category_id must be in 1..90, got {item['category_id']}")
            codes[row[item["image_id"]], item["category_id"] - 1] = 1
    return codes, codes.any(1)


def pmrp(sim, codes, caption_image_index, zetas: Sequence[int] = (0, 1, 2),
         folds: int | None = None, drop_last: bool = False,
         annotated=None) -> dict[str, float | np.ndarray]:
    """Plausible-Match R-Precision (section 4.1): items whose codes differ in at most zeta bits
    match.

    sim (Ni, Nc); codes (Ni, K) binary; caption_image_index (Nc,) row of each caption's image;
    annotated (Ni,) bool, False: the image and its captions take no part. PERCENT means over zetas
    and queries (and folds, consecutive image blocks cut before unannotated images leave):
    {i2t,t2i}_pmrp, {i2t,t2i}_pmr1 (the top item is plausible). Without folds also
    {i2t,t2i}_rprecision, {i2t,t2i}_r1, arrays (len(zetas), queries). drop_last loses the last item
    of every full ranking, as the public ranking files do.

    Against human labels, plausible matches have precision 65.3 / 56.6 and recall 56.5 / 61.8
    percent; COCO's own pairs have 96.9 / 96.4 and 21.1 / 13.8 (ECCV Caption, image to text / text
    to image).
    """
    sim = _similarity(sim)
    count = len(sim)
    annotated = np.ones(count, dtype=bool) if annotated is None else annotated
    keep, owner = _aligned(sim, annotated=annotated, caption_image_index=caption_image_index)
    codes = torch.as_tensor(codes, device=sim.device).float()
    if codes.ndim != 2 or len(codes) != count or ((codes != 0) & (codes != 1)).any():
        raise ValueError(f"codes must be ({count}, K) of 0 or 1, got {tuple(codes.shape)}")
    if owner.is_floating_point() or owner.min() < 0 or owner.max() >= count:
        raise ValueError(f"caption_image_index must be integers in 0..{count - 1}")
    if not len(zetas) or any(zeta < 0 or zeta != int(zeta) for zeta in zetas):
        raise ValueError(f"zetas must be integers >= 0, got {zetas!r}")

    def score(rows: slice) -> dict[str, np.ndarray]:
        inside = torch.zeros(count, dtype=torch.bool, device=sim.device)
        inside[rows] = keep[rows].bool()
        images, captions = inside.nonzero().flatten(), inside[owner].nonzero().flatten()
        if not len(captions):
            raise ValueError(f"annotated leaves no caption of images {rows.start}..{rows.stop - 1}")
        ways = {"i2t": (sim, images, captions, codes, codes[owner]),
                "t2i": (sim.T, captions, images, codes[owner], codes)}
        result = {}
        for way, (scores, queries, gallery, q_codes, g_codes) in ways.items():
            values = torch.empty(2, len(zetas), len(queries), dtype=torch.float64,
                                 device=sim.device)
            for part, target in zip(queries.split(ROWS), values.split(ROWS, dim=2)):
                _plausible_precision(target, scores[part], gallery, q_codes[part], g_codes[gallery],
                                     zetas, drop_last)
            result[f"{way}_rprecision"], result[f"{way}_r1"] = values.cpu().numpy()
        return result

    parts = [score(rows) for rows in _folds(count, folds or 1)]
    result = {f"{way}_{short}": 100 * float(np.mean([p[f"{way}_{name}"].mean() for p in parts]))
              for way in ("i2t", "t2i") for short, name in (("pmrp", "rprecision"), ("pmr1", "r1"))}
    return result if folds is not None else {**result, **parts[0]}


def _plausible_precision(target: Tensor, scores: Tensor, gallery: Tensor, q_codes: Tensor,
                         g_codes: Tensor, zetas: Sequence[int], drop_last: bool) -> None:
    """R-Precision and R@1 of some queries, ranked over `gallery` columns, into target (2, zetas,
    queries).

    No ranking is formed: the R-th largest score of a row tells which items are among its first R.
    """
    hamming = q_codes @ (1 - g_codes).T + (1 - q_codes) @ g_codes.T
    if drop_last:                                            # the last of a stable descending order
        last = scores.shape[1] - 1 - scores.flip(1).argmin(1)
        hamming = hamming.masked_fill(gallery == last[:, None], math.inf)
    scores = scores[:, gallery]
    top = scores.argmax(1, keepdim=True)                      # the first of equal ones
    # numpy sorts values on the CPU several times faster than torch
    ordered = (scores.sort(1).values if scores.device.type != "cpu"
               else torch.from_numpy(np.sort(scores.numpy(), axis=1)))
    for precision, first, zeta in zip(*target, zetas):
        plausible = hamming <= zeta
        r = plausible.sum(1, keepdim=True)
        _with_positives(r.flatten())
        cut = ordered.gather(1, scores.shape[1] - r)
        among = scores >= cut
        if (among.sum(1, keepdim=True) > r).any():            # of equal scores, the first ones
            tied = scores == cut
            among &= ~tied | (tied.cumsum(1) <= r - (scores > cut).sum(1, keepdim=True))
        precision.copy_((plausible & among).sum(1) / r.flatten().double())
        first.copy_(plausible.gather(1, top).flatten())


# ---------------------------------------------------------------- uncertainty

def uncertainty(logsigma, kind: str = "geometric_mean") -> Tensor:
    """logsigma (N, D) -> (N,): "geometric_mean" mean_k logsigma, or "trace" sum_k sigma^2."""
    logsigma = _wide(torch.as_tensor(logsigma))
    if logsigma.ndim != 2:
        raise ValueError(f"logsigma must be (N, D), got {tuple(logsigma.shape)}")
    _check_choice(("geometric_mean", "trace"), kind=kind)
    return logsigma.mean(1) if kind == "geometric_mean" else (2 * logsigma).exp().sum(1)


def uncertainty_bins(u, metric, n_bins: int = 10) -> dict[str, np.ndarray | float]:
    """Means of u and metric (N,) in n_bins bins of rising u, floor(N / n_bins) each, the rest left
    out.

    metric, uncertainty (n_bins,); correlation: Pearson of bin index and metric, strongly negative
    for an uncertainty that predicts failure.
    """
    u, metric = np.asarray(u, dtype=np.float64), np.asarray(metric, dtype=np.float64)
    if u.ndim != 1 or u.shape != metric.shape or not 2 <= n_bins <= len(u):
        raise ValueError(f"u and metric must be equal (N,) with N >= n_bins >= 2, got {u.shape}, "
                         f"{metric.shape}, {n_bins}")
    order = np.argsort(u, kind="stable")[:len(u) // n_bins * n_bins].reshape(n_bins, -1)
    bins = metric[order].mean(1)
    correlation = np.corrcoef(np.arange(n_bins), bins)[0, 1] if bins.std() > 0 else 0.0
    return {"metric": bins, "uncertainty": u[order].mean(1), "correlation": float(correlation)}


def _check_ratios(ratios: Sequence[float]) -> None:
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios must be in [0, 1], got {list(ratios)}")


def occlude(images: Tensor, ratio: float, seed: int = 0) -> Tensor:
    """Images (N, C, H, W) with a zero (grey) rectangle over `ratio` of the area, anywhere."""
    height, width = images.shape[-2:]
    h, w = round(height * math.sqrt(ratio)), round(width * math.sqrt(ratio))
    place = torch.rand(2, len(images), generator=torch.Generator().manual_seed(seed))
    room = torch.tensor([[height - h + 1], [width - w + 1]])
    top, left = (place * room).long()[:, :, None, None]
    y, x = torch.arange(height).view(1, -1, 1), torch.arange(width)
    hidden = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    return images.masked_fill(hidden.unsqueeze(1).to(images.device), 0.0)


def drop_words(tokens: Tensor, lengths: Tensor, ratio: float,
               seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (N, T) and lengths without `ratio` of the words; the end markers stay."""
    lengths = _check_lengths(tokens, lengths)
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    word = (position > 0) & (position < lengths.unsqueeze(1) - 1)
    draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    turn = draw.masked_fill(~word, 2.0).argsort(1).argsort(1)          # words leave in this order
    gone = word & (turn < (word.sum(1, keepdim=True) * ratio).round())
    absent = (gone | (position >= lengths.unsqueeze(1))).to(torch.uint8)
    order = absent.sort(dim=1, stable=True).indices
    kept = lengths - gone.sum(1)
    return tokens.gather(1, order).masked_fill(position >= kept.unsqueeze(1), 0), kept


@torch.no_grad()
def occlusion_curve(model: PCME, images: Tensor, ratios: Sequence[float],
                    seed: int = 0) -> dict[float, float]:
    """Ratio -> mean uncertainty of images with that part of the area hidden (`occlude`)."""
    _check_ratios(ratios)
    return {ratio: uncertainty(model.encode_image(occlude(images, ratio, seed),
                                                  num_samples=0)["logsigma"]).mean().item()
            for ratio in ratios}


@torch.no_grad()
def word_drop_curve(model: PCME, tokens: Tensor, lengths: Tensor, ratios: Sequence[float],
                    seed: int = 0) -> dict[float, float]:
    """Ratio -> mean uncertainty of captions without that part of their words (`drop_words`)."""
    _check_ratios(ratios)
    return {ratio: uncertainty(model.encode_text(*drop_words(tokens, lengths, ratio, seed),
                                                 num_samples=0)["logsigma"]).mean().item()
            for ratio in ratios}


# ---------------------------------------------------------------- tokens

# A caption is read once, from left to right; whatever is no break belongs to a word.
_BREAKS = r"""`+ | \.{2,} | -- | [«“‘„»”’] | [][(){}<>;@\#$%&?!*\u2012-\u2015]
    | [:,] (?!\d)                                             # 10:30 and 1,000 stay whole
    | \. (?= (?: [])}>'»”’\s] | (?<!\s)" )* $ )               # the period that ends the caption
    | (?<!\w) ' (?! (?:re|ve|ll|[mtsdn])\b ) (?=\w """        # an apostrophe that opens a quotation
_QUOTES = r"""(?P<opening> (?<![^\s(\[{<`«“‘„]) " | (?<=[\s(\[{<`«“‘„]) '' )
    | (?P<closing> " | '' )"""
_TOKENS = {
    legacy: re.compile(rf"""{_QUOTES} | {breaks}
                    | (?P<word> [a-z]+ (?!\S) | (?: (?! " | '' | {breaks} ) \S )+ )""", re.VERBOSE)
    for legacy, breaks in ((False, _BREAKS + ")"), (True, _BREAKS + r"\b)"))}
_CLITICS = re.compile(r"(.*?[^'])('ll|'re|'ve|n't)?('[smd]?)?")
_JOINED = {"cannot": 3, "gimme": 3, "gonna": 3, "gotta": 3, "lemme": 3, "wanna": 3, "d'ye": 1,
           "more'n": 4, "'tis": 2, "'twas": 2}                # where the two words meet
_FIND_JOINED = re.compile(rf"(?<!\w)({'|'.join(_JOINED)})(?!\w)(?!(?<=wanna)\S)")


def tokenize(caption: str, legacy_quotes: bool = False) -> list[str]:
    """Lower-cased tokens of one sentence in the Penn Treebank manner of the published vocabularies.

    legacy_quotes=True splits a leading apostrophe before a single letter only, as was done when
    those vocabularies were made. Sentences are not separated: only a period at the very end is
    split.
    """
    if not isinstance(caption, str):
        raise TypeError(f"caption must be a string, got {type(caption).__name__}")
    tokens = []
    for match in _TOKENS[legacy_quotes].finditer(caption.lower()):
        text, kind = match[0], match.lastgroup
        if kind != "word":
            tokens.append({"opening": "``", "closing": "''"}.get(kind, text))
            continue
        clitics = _CLITICS.fullmatch(text)
        for part in clitics.groups("") if clitics else (text,):
            for piece in _FIND_JOINED.split(part):
                cut = _JOINED.get(piece, 0)
                tokens += filter(None, (piece[:cut], piece[cut:]))
    return tokens


# ---------------------------------------------------------------- training

_FROZEN = ("img_enc.cnn", "txt_enc.embed")
# The published recipes: train(..., **RECIPES["coco"]). Phase 1 keeps backbone and word vectors.
RECIPES = {
    "coco": {"epochs": (30, 30), "phases": ({"lr": 2e-4, "t_max": 30, "frozen": _FROZEN},
                                            {"lr": 2e-5, "t_max": 30})},
    "cub": {"epochs": (10, 50), "phases": ({"lr": 1e-4, "t_max": 50, "frozen": _FROZEN},
                                           {"lr": 1e-4, "t_max": 50})},
}


def train(model: PCME, criterion: nn.Module, loader: Iterable, *, epochs: int | Sequence[int],
          phases: Sequence[dict] = ({"lr": 2e-4},), optimizer: Callable = torch.optim.Adam,
          clip: float | None = 2.0, amp: torch.dtype | None = None, freeze_bn: bool = False,
          seed: int = 0, resume: dict | None = None) -> Iterator[dict[str, float]]:
    """The training loop; yields one dict of floats per step.

    loader gives (images, tokens, lengths), then image ids, then the image ids of the captions where
    these differ: with ids, captions of one image in a batch count as its matches (the published
    code takes them for negatives). epochs: of each phase. A phase {"lr", "t_max" (default: its
    epochs), "frozen" (prefixes of parameter names)} starts a new `optimizer(parameters, lr=...)`
    (the paper: AdamP) and a cosine to 0 over t_max, stepped once per epoch. clip: gradient norm of
    the model, not of the criterion. Frozen batch norm still moves its statistics, as published,
    unless freeze_bn. amp: encoders under autocast; samples and loss stay in float32. seed draws the
    samples.

    In a process group the samples of all ranks are gathered, so that the loss and its gradient are
    those of the whole batch (ranks need equal batches). Send "state" for a snapshot; `resume` takes
    it and goes on to the same numbers.
    """
    counts = [epochs] * len(phases) if isinstance(epochs, int) else list(epochs)
    if len(counts) != len(phases) or min(counts, default=0) < 1:
        raise ValueError(f"epochs must be positive, one per phase ({len(phases)}), got {epochs}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    start, own = {"phase": 0, "epoch": 0, "batch": 0, "step": 0}, list(criterion.parameters())
    if resume:
        model.load_state_dict(resume["model"])
        criterion.load_state_dict(resume["criterion"])
        generator.set_state(resume["generator"])
        start = resume["position"]
    step = start["step"]
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for phase in range(start["phase"], len(phases)):
        settings = phases[phase]
        frozen, t_max = tuple(settings.get("frozen", ())), settings.get("t_max", counts[phase])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name] and not name.startswith(frozen))
        weights = [p for p in model.parameters() if p.requires_grad]
        updates = optimizer(weights + own, lr=settings["lr"])
        resumed = resume is not None and phase == start["phase"]
        if resumed:
            updates.load_state_dict(resume["optimizer"])
            scaler.load_state_dict(resume["scaler"])
        for epoch in range(start["epoch"] if resumed else 0, counts[phase]):
            lr = settings["lr"] * 0.5 * (1 + math.cos(math.pi * epoch / t_max))
            for group in updates.param_groups:
                group["lr"] = lr
            model.train()
            for module in model.modules():
                if freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
            skip = start["batch"] if resumed and epoch == start["epoch"] else 0
            for index, batch in _batches(loader, sum(counts[:phase]) + epoch, skip):
                batch = [None if part is None else part.to(device) for part in batch]
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    out = model(*batch[:3], num_samples=0)
                loss, parts = _batch_loss(model, criterion, out, batch[3:], generator)
                updates.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(updates)
                _reduce_gradients(weights, own)
                norm = nn.utils.clip_grad_norm_(weights, math.inf if clip is None else clip)
                scaler.step(updates)
                scaler.update()
                step += 1
                values = {**parts, "grad_norm": norm.detach()}
                floats = torch.stack([v.float().to(device).reshape(()) for v in values.values()])
                row = {"step": step, "phase": phase, "epoch": epoch, "lr": lr,
                       **dict(zip(values, floats.tolist()))}
                if (yield row) == "state":
                    yield {"model": model.state_dict(), "criterion": criterion.state_dict(),
                           "optimizer": updates.state_dict(), "scaler": scaler.state_dict(),
                           "generator": generator.get_state(), "position": {
                               "phase": phase, "epoch": epoch, "batch": index + 1, "step": step}}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def _batches(loader: Iterable, epoch: int, skip: int) -> Iterator[tuple[int, Sequence]]:
    """The numbered batches of an epoch from `skip` on; `set_epoch` lets a loader begin there."""
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)
        return enumerate(loader, skip)
    return itertools.islice(enumerate(loader), skip, None)


def _batch_loss(model: PCME, criterion: nn.Module, out: dict, ids: list[Tensor],
                generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The criterion over the samples of all ranks."""
    j = getattr(model.img_enc, "n_samples_inference", 7)
    mu, logsigma, samples = {}, {}, {}
    for side in ("image", "caption"):
        mu[side], logsigma[side] = (_gathered(out[f"{side}_{name}"].float())
                                    for name in ("mu", "logsigma"))
        samples[side] = (sample_gaussian(mu[side], logsigma[side], j, generator) if j
                         else mu[side].unsqueeze(1))
    matched = _gathered(ids[0])[:, None] == _gathered(ids[-1]) if ids else None
    return criterion(*samples.values(), *logsigma.values(), matched, generator=generator,
                     image_mu=mu["image"], caption_mu=mu["caption"])


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; only the own ones carry a gradient."""
    if _ranks() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(_ranks())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def _reduce_gradients(weights: list[Tensor], own: list[Tensor]) -> None:
    """Sum the weights' gradients over the ranks (of their own rows); average the criterion's."""
    for parameter in weights + own if _ranks() > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
    for parameter in own:
        if parameter.grad is not None:
            parameter.grad /= _ranks()


# ---------------------------------------------------------------- demonstration

def _demonstrate() -> None:
    """Images with 6 attributes of 6 values, captions that name some of them."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(36, 64, generator=g) / math.sqrt(6)

    def world(count: int) -> tuple[Tensor, Tensor, None]:
        hot = F.one_hot(torch.randint(6, (count, 6), generator=g), 6).float()
        order = torch.rand(count, 6, generator=g).argsort(1)
        named = order < torch.randint(1, 7, (count, 1), generator=g)
        images = hot.flatten(1) @ mix + 0.1 * torch.randn(count, 64, generator=g)
        return images, (hot * named.unsqueeze(-1)).flatten(1), None

    model = PCME(*(nn.Sequential(nn.Linear(d, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
                                 GaussianHead(256, 32, -2.0)) for d in (64, 36)))
    for _ in train(model, MCSoftContrastiveLoss(15, 15, vib_beta=1e-5),
                   (world(128) for _ in range(200)), epochs=1, phases=({"lr": 1e-3},), clip=None):
        pass
    captions = world(2000)[1]
    u = uncertainty(model.encode_text(captions)["logsigma"].detach())
    print("A caption that says less is more uncertain: mean log sigma by the number of attributes "
          "it names, after 200 steps")
    print("  ".join(f"{m}: {u[captions.sum(1) == m].mean():.2f}" for m in range(1, 7)))


if __name__ == "__main__":
    _demonstrate()
