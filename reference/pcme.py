r"""PCME: probabilistic embeddings for cross-modal retrieval.

Chun, Oh, Sampaio de Rezende, Kalantidis, Larlus, "Probabilistic Embeddings for Cross-Modal Retrieval", CVPR 2021,
arXiv:2101.05068. Successor: PCME++ (arXiv:2305.18171), here `ClosedFormSampledDistanceLoss`.

Images and captions match many to many: an image fits many captions, a vague caption fits many images. PCME maps each
item to a Gaussian N(mu, diag sigma^2), |mu| = 1, in one D-dimensional space. Two items match with probability

    p = E sigmoid(2 (b - a |z - z'|)),   z ~ N(mu, sigma^2),  z' ~ N(mu', sigma'^2),   a, b learned,

estimated from all J^2 pairs of J samples each (the factor 2 is that of the published code). The loss is the negative
log-likelihood of match / no match over all pairs of a batch. sigma needs no label: it grows for vague captions
and occluded images, and predicts where retrieval fails.

What to copy: any two towers that give (mu, log sigma) + `sample_gaussian` + `MCSoftContrastiveLoss` + `pairwise_similarity`.

    >>> head_i, head_t = GaussianHead(512, 64), GaussianHead(300, 64)      # on features of any pair of towers
    >>> criterion = MCSoftContrastiveLoss(init_shift=5, init_negative_scale=5, vib_beta=1e-4)
    >>> image, text = head_i(torch.randn(8, 512)), head_t(torch.randn(8, 300))
    >>> loss, parts = criterion(sample_gaussian(*image, 7), sample_gaussian(*text, 7), image[1], text[1])
    >>> loss.backward()
    >>> pairwise_similarity(image[0].detach(), text[0].detach(), "csd", image[1].detach(), text[1].detach()).shape
    torch.Size([8, 8])

`logsigma` is the log STANDARD DEVIATION everywhere except in the KL term, where the published code reads the same number
as a log variance (`kl_convention`), and in PCME++, whose heads give log variances. Losses are SUMS over pairs: a
learning rate or clipping threshold found at one batch size does not carry over to another.

Reproduces: on COCO the paper reports best plausible-match R-Precision (1K: 45.0 / 46.0) with R@1 68.8 / 54.6.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

DISTANCE_EPS = 1e-6                                           # inside the root of every sample distance


# ---------------------------------------------------------------- heads (paper, section 3.2)

class MultiHeadSelfAttention(nn.Module):
    """Attention pooling: softmax_t(tanh(x W1^T) W2^T) weights the T items of x (B, T, d_in).

    Returns pooled (B, n_head, d_in), without the middle axis when n_head is 1, and the weights (B, T, n_head).
    mask (B, T) bool is True where x is padding; a row must keep at least one item.
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
    """LayerNorm(out + sigmoid(Linear(attention pooling of x))): a global state refined by what x holds locally.

    out (B, d_out), x (B, T, d_in) -> out, attention (B, T, K), residual; K = n_embeds > 1 adds an axis to both.
    """

    def __init__(self, n_embeds: int, d_in: int, d_out: int, d_h: int, dropout: float = 0.0):
        super().__init__()
        self.n_embeds = n_embeds
        self.attention = MultiHeadSelfAttention(n_embeds, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_out)

    def forward(self, out: Tensor, x: Tensor, pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        pooled, attention = self.attention(x, pad_mask)
        residual = self.dropout(torch.sigmoid(self.fc(pooled)))
        if self.n_embeds > 1:
            out = out.unsqueeze(1)
        return self.layer_norm(out + residual), attention, residual


class UncertaintyModuleImage(nn.Module):
    """logsigma = Linear(attention pooling of x) + Linear(pooled): free of sigmoid, LayerNorm and normalisation."""

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
        self.attention = MultiHeadSelfAttention(1, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.rnn = nn.GRU(d_in, d_out // 2, bidirectional=True, batch_first=True)
        self.final_state = final_state

    def forward(self, x: Tensor, pad_mask: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        residual, attention = self.attention(x, pad_mask)
        state = _sentence_state(self.rnn, x, lengths, self.final_state)
        return {"logsigma": self.fc(residual) + state, "attention": attention}


class GaussianHead(nn.Module):
    """x (B, d_in) -> mu (B, d_out) of unit norm and logsigma (B, d_out), which starts near `init_logsigma`."""

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
    """(B, D) state of a bidirectional GRU over right-padded x, without packing (so without a device-to-host copy).

    "last_position" reads both directions at the last word, as the published model does: its backward half has
    seen that one word only. "both_ends" reads the backward half where it has seen the whole sentence.
    """
    def run(sequence: Tensor, suffix: str) -> Tensor:
        weights = [getattr(rnn, name + "_l0" + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
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
    """Gaussian embedding of images on any `backbone`: images -> (B, cnn_dim, H, W), or (B, cnn_dim) global features.

    Returns a dict: embedding (B, J, D) samples, or mu (B, D) when J = n_samples_inference is 0; mu (B, D); logsigma (B, D);
    attention, uncertainty_attention (B, H*W, 1); residual (B, D). Parameter names are those of the public model.
    """

    def __init__(self, backbone: nn.Module, cnn_dim: int, embed_dim: int, n_samples_inference: int = 7):
        super().__init__()
        self.n_samples_inference = n_samples_inference
        self.cnn = backbone
        self.fc = nn.Linear(cnn_dim, embed_dim)
        self.pie_net = PIENet(1, cnn_dim, embed_dim, cnn_dim // 2)
        self.uncertain_net = UncertaintyModuleImage(cnn_dim, embed_dim, cnn_dim // 2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None,
                num_samples: int | None = None) -> dict[str, Tensor]:
        features = self.cnn(images)
        if features.ndim not in (2, 4) or features.shape[1] != self.fc.in_features:
            raise ValueError(f"backbone must give (B, {self.fc.in_features}, H, W) or (B, {self.fc.in_features}), "
                             f"got {tuple(features.shape)}")
        local = features.reshape(*features.shape[:2], -1).transpose(1, 2)
        pooled = local.mean(1)
        out, attention, residual = self.pie_net(self.fc(pooled), local)
        uncertain = self.uncertain_net(pooled, local)
        j = self.n_samples_inference if num_samples is None else num_samples
        return _encoded(out, attention, residual, uncertain, j, generator)


class EncoderText(nn.Module):
    """Gaussian embedding of token sequences (B, T), padded on the right, with lengths (B,) int64 in any order.

    Two bidirectional GRUs (mean and uncertainty) give the sentence states; attention reads the word vectors.
    Returns the dict of `EncoderImage`, attention over the T words. final_state: see `_sentence_state`.
    """

    def __init__(self, vocab_size: int, word_dim: int = 300, embed_dim: int = 1024,
                 final_state: str = "last_position", n_samples_inference: int = 7):
        super().__init__()
        if final_state not in ("last_position", "both_ends"):
            raise ValueError(f"final_state must be 'last_position' or 'both_ends', got {final_state!r}")
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
        out, attention, residual = self.pie_net(state, words, pad_mask)
        uncertain = self.uncertain_net(words, pad_mask, lengths)
        j = self.n_samples_inference if num_samples is None else num_samples
        return _encoded(out, attention, residual, uncertain, j, generator)


def _encoded(out, attention, residual, uncertain, num_samples, generator) -> dict[str, Tensor]:
    mu, logsigma = F.normalize(out, dim=-1), uncertain["logsigma"]
    embedding = sample_gaussian(mu, logsigma, num_samples, generator) if num_samples else mu
    return {"embedding": embedding, "mu": mu, "logsigma": logsigma, "attention": attention, "residual": residual,
            "uncertainty_attention": uncertain["attention"]}


def _check_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    lengths = torch.as_tensor(lengths)
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths must be integers, got {lengths.dtype}")
    if tokens.ndim != 2 or lengths.shape != tokens.shape[:1] or not len(tokens):
        raise ValueError(f"tokens must be (B, T) and lengths (B,), got {tuple(tokens.shape)} and {tuple(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths must be in 1..{tokens.shape[1]}, got {lengths.min().item()}..{lengths.max().item()}")
    return lengths.to(tokens.device, torch.int64)


class PCME(nn.Module):
    """An image tower and a text tower. A tower is an encoder above, or any module that gives (mu, logsigma)."""

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.img_enc, self.txt_enc = image_encoder, text_encoder

    def encode_image(self, images: Tensor, **options) -> dict[str, Tensor]:
        return self._encode(self.img_enc, (images,), options)

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, **options) -> dict[str, Tensor]:
        return self._encode(self.txt_enc, (tokens, lengths), options)

    @staticmethod
    def _encode(encoder, inputs, options):
        if isinstance(encoder, (EncoderImage, EncoderText)):
            return encoder(*inputs, **options)
        mu, logsigma = encoder(inputs[0])
        return _encoded(mu, None, None, {"logsigma": logsigma, "attention": None},
                        options.get("num_samples", 7), options.get("generator"))

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor | None = None, **options) -> dict[str, Tensor]:
        """{image,caption}_{features,attentions,residuals,logsigma,logsigma_att,mu}; options: generator, num_samples."""
        names = {"features": "embedding", "attentions": "attention", "residuals": "residual", "logsigma": "logsigma",
                 "logsigma_att": "uncertainty_attention", "mu": "mu"}
        sides = {"image": self.encode_image(images, **options), "caption": self.encode_text(tokens, lengths, **options)}
        return {f"{side}_{name}": out[key] for side, out in sides.items() for name, key in names.items()}

    def load_official(self, state_dict: dict) -> None:
        """Load a checkpoint of the public implementation (its dict, or the entry "model" alone); names must all match."""
        state = state_dict.get("model", state_dict)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        own = self.state_dict()
        # Trunks saved without BatchNorm's step counters are complete all the same.
        missing = sorted(name for name in own.keys() - state.keys() if not name.endswith("num_batches_tracked"))
        extra = sorted(state.keys() - own.keys())
        shapes = [f"{n}: {tuple(state[n].shape)} in the file, {tuple(own[n].shape)} here"
                  for n in own.keys() & state.keys() if state[n].shape != own[n].shape]
        if missing or extra or shapes:
            raise ValueError(f"state_dict does not fit: missing {missing[:4]}, unknown {extra[:4]}, shapes {sorted(shapes)[:4]}")
        self.load_state_dict(state, strict=False)


# ---------------------------------------------------------------- sampling

def sample_gaussian(mu: Tensor, logsigma: Tensor, num_samples: int, generator: torch.Generator | None = None,
                    antithetic: bool = False, eps: Tensor | None = None) -> Tensor:
    """z = mu + exp(logsigma) * eps (paper, section 3.2): mu, logsigma (B, D) -> (B, J, D). Samples are not normalised.

    eps (B, J, D) replaces the draw; antithetic=True draws pairs eps, -eps. Half precision gives float32 samples.
    """
    if mu.ndim != 2 or mu.shape != logsigma.shape:
        raise ValueError(f"mu and logsigma must both be (B, D), got {tuple(mu.shape)} and {tuple(logsigma.shape)}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    mu, logsigma = _at_least_float32(mu), _at_least_float32(logsigma)
    shape = (len(mu), num_samples, mu.shape[1])
    if eps is None:
        drawn = (shape[0], -(-num_samples // 2) if antithetic else num_samples, shape[2])
        eps = torch.randn(drawn, generator=generator, device=mu.device, dtype=mu.dtype)
        if antithetic:
            eps = torch.cat([eps, -eps], dim=1)[:, :num_samples]
    elif eps.shape != shape:
        raise ValueError(f"eps must be {shape}, got {tuple(eps.shape)}")
    return torch.addcmul(mu.unsqueeze(1), logsigma.exp().unsqueeze(1), eps.to(mu))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ---------------------------------------------------------------- losses

def _distances(q: Tensor, g: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m): sqrt(|q - g|^2 + eps) by one matrix product."""
    squared = torch.addmm(g.square().sum(-1), q, g.T, alpha=-2)
    if torch.is_grad_enabled():
        return ((squared + q.square().sum(-1, keepdim=True)).clamp(min=0) + DISTANCE_EPS).sqrt()
    return squared.add_(q.square().sum(-1, keepdim=True)).clamp_(min=0).add_(DISTANCE_EPS).sqrt_()


def _log_mean_sigmoid(logits: Tensor) -> Tensor:
    """log of the mean over axes 1 and 3 of sigmoid(logits), never forming the probability."""
    return torch.logsumexp(F.logsigmoid(logits), dim=(1, 3)) - math.log(logits.shape[1] * logits.shape[3])


def _check_samples(first: Tensor, second: Tensor, names=("image_samples", "caption_samples")) -> None:
    for name, samples in zip(names, (first, second)):
        if not isinstance(samples, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(samples).__name__}")
        if samples.ndim != 3 or 0 in samples.shape:
            raise ValueError(f"{name} must be a non-empty (N, J, D) tensor, got {tuple(samples.shape)}")
    if first.shape[2] != second.shape[2]:
        raise ValueError(f"{names[0]} and {names[1]} must have the same D, got {first.shape[2]} and {second.shape[2]}")


def _check_matched(matched: Tensor | None, n_images: int, n_captions: int, like: Tensor) -> Tensor:
    """(Ni, Nc) bool for the diagonal and for hard labels, floats in [0, 1] for soft ones."""
    if matched is None:
        if n_images != n_captions:
            raise ValueError(f"matched is needed when the numbers of images and captions differ ({n_images}, {n_captions})")
        return torch.eye(n_images, dtype=torch.bool, device=like.device)
    matched = torch.as_tensor(matched, device=like.device)
    if matched.shape != (n_images, n_captions):
        raise ValueError(f"matched must be ({n_images}, {n_captions}), got {tuple(matched.shape)}")
    if matched.dtype == torch.bool:
        return matched
    if not ((matched >= 0) & (matched <= 1)).all():
        raise ValueError("matched must be in [0, 1]")
    return matched.to(like.dtype)


def _check_weights(**weights: float) -> None:
    for name, value in weights.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")


class MCSoftContrastiveLoss(nn.Module):
    r"""The soft contrastive loss over all image-caption pairs of a batch, estimated from samples.

    For samples z of the image and z' of the caption, with s = b - a |z - z'| (paper, equations 1-4):

        nll(match)    = -log mean_{J^2} sigmoid( 2 s)          total = 2 sum_pairs nll + uniform_lambda * U
        nll(no match) = -log mean_{J^2} sigmoid(-2 s)                  + vib_beta * (KL_image + KL_caption)

    U = log mean_{p<q} exp(-2 |x_p - x_q|^2) over (at most 128 drawn rows of) all samples spreads them out.
    KL, per item and dimension, keeps sigma from collapsing: "official" -(1 + l - m^2 - e^l) / 2 with l = logsigma
    read as a log variance and m the mean of the samples; "std" the exact -(1 + 2 l - mu^2 - e^(2 l)) / 2.

    block: images per block; the pair matrix of a block is recomputed in the backward pass, which bounds the memory to
    O(block * J * Nc * J). deterministic_weight adds InfoNCE on the means, which helps training from scratch.
    """

    def __init__(self, init_shift: float = 15, init_negative_scale: float = 15, num_samples: int = 7,
                 uniform_lambda: float = 0.0, vib_beta: float = 0.0, reduction: str = "sum",
                 kl_convention: str = "official", block: int | None = None, *, deterministic_weight: float = 0.0):
        super().__init__()
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"reduction must be 'sum', 'mean' or 'none', got {reduction!r}")
        if kl_convention not in ("official", "std"):
            raise ValueError(f"kl_convention must be 'official' or 'std', got {kl_convention!r}")
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        _check_weights(uniform_lambda=uniform_lambda, vib_beta=vib_beta, deterministic_weight=deterministic_weight)
        self.shift = nn.Parameter(torch.full((1,), float(init_shift)))
        self.negative_scale = nn.Parameter(torch.full((1,), float(init_negative_scale)))
        self.num_samples, self.uniform_lambda, self.vib_beta = num_samples, uniform_lambda, vib_beta
        self.reduction, self.kl_convention, self.block = reduction, kl_convention, block
        self.deterministic_weight = deterministic_weight

    def forward(self, image_samples: Tensor, caption_samples: Tensor, image_logsigma: Tensor | None = None,
                caption_logsigma: Tensor | None = None, matched: Tensor | None = None,
                uniform_rows: Tensor | None = None, generator: torch.Generator | None = None, *,
                image_mu: Tensor | None = None, caption_mu: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples (Ni, J, D), (Nc, J, D) -> loss and its parts as detached 0-d tensors.

        matched (Ni, Nc): True, 1 or a degree in [0, 1] where the pair matches; None: the diagonal.
        """
        _check_samples(image_samples, caption_samples)
        images, captions = _at_least_float32(image_samples), _at_least_float32(caption_samples)
        matched = _check_matched(matched, len(images), len(captions), images)
        with torch.autocast(images.device.type, enabled=False):        # half precision would spoil the distances
            if self.block is None or self.block >= len(images):
                nll, soft = self._nll(images, captions, matched)
            else:
                parts = [checkpoint(self._nll, i, captions, m, use_reentrant=False)
                         for i, m in zip(images.split(self.block), matched.split(self.block))]
                nll, soft = (torch.cat(column) for column in zip(*parts))
            positive, total = soft.sum(), nll.sum()
            uniform = vib = deterministic = images.new_zeros(())
            if self.uniform_lambda:
                uniform = self._uniformity(images, captions, uniform_rows, generator)
            if self.vib_beta:
                vib = (self._kl(images, image_logsigma, image_mu, "image")
                       + self._kl(captions, caption_logsigma, caption_mu, "caption"))
            if self.deterministic_weight:
                means = (images.mean(1) if image_mu is None else image_mu,
                         captions.mean(1) if caption_mu is None else caption_mu)
                deterministic = _info_nce(*means, matched, images.new_tensor(1 / 0.07))
            extra = (self.uniform_lambda * uniform + self.vib_beta * vib + self.deterministic_weight * deterministic)
            loss = {"sum": 2 * total + extra, "mean": 2 * total / nll.numel() + extra, "none": 2 * nll}[self.reduction]
        parts = {"loss": loss, "uniform_loss": uniform, "vib_loss": vib,
                 "shift": self.shift[0], "negative_scale": self.negative_scale[0]}
        for way in ("i2t", "t2i"):                            # equal by symmetry; both names are the published ones
            parts |= {f"{way}_loss": total, f"{way}_pos_loss": positive, f"{way}_neg_loss": total - positive}
        return loss, {name: value.detach().clone() for name, value in parts.items()}

    def _nll(self, images: Tensor, captions: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        """(Ni, Nc) negative log-likelihoods, and the share of each that is due to matching."""
        s = self._logits(images, captions)
        if matched.dtype == torch.bool:                       # one log-likelihood per pair is enough
            sign = torch.where(matched, 1.0, -1.0).to(s.dtype)[:, None, :, None]
            nll = -_log_mean_sigmoid(sign * s)
            return nll, nll * matched
        positive, negative = -matched * _log_mean_sigmoid(s), -(1 - matched) * _log_mean_sigmoid(-s)
        return positive + negative, positive

    def _logits(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, Ng, J') of 2 (b - a d)."""
        distance = _distances(q.flatten(0, 1), g.flatten(0, 1))
        return (2 * (self.shift - self.negative_scale * distance)).view(*q.shape[:2], *g.shape[:2])

    @staticmethod
    def _uniformity(images: Tensor, captions: Tensor, rows: Tensor | None, generator) -> Tensor:
        x = torch.cat([images.flatten(0, 1), captions.flatten(0, 1)])
        if rows is None and len(x) > 128:                     # the published rule: with replacement
            rows = torch.randint(len(x), (128,), generator=generator, device=x.device if generator is None else generator.device)
        if rows is not None:
            x = x[torch.as_tensor(rows, device=x.device)]
        if len(x) < 2:
            raise ValueError(f"the uniformity term needs at least 2 rows, got {len(x)}")
        norms = x.square().sum(-1)
        squared = (norms[:, None] + norms - 2 * x @ x.T).clamp(min=0)   # no root: no NaN gradient at duplicates
        upper = torch.ones_like(squared, dtype=torch.bool).triu(1)
        return torch.logsumexp(-2 * squared[upper], 0) - math.log(len(x) * (len(x) - 1) / 2)

    def _kl(self, samples: Tensor, logsigma: Tensor | None, mu: Tensor | None, side: str) -> Tensor:
        expected = (samples.shape[0], samples.shape[2])
        if logsigma is None or logsigma.shape != expected:
            raise ValueError(f"{side}_logsigma must be {expected} when vib_beta is not 0, "
                             f"got {None if logsigma is None else tuple(logsigma.shape)}")
        logsigma, mean = logsigma.to(samples.dtype), samples.mean(1)
        if self.kl_convention == "std":
            logsigma, mean = 2 * logsigma, mean if mu is None else mu.to(samples.dtype)
        return -0.5 * (1 + logsigma - mean.square() - logsigma.exp()).sum()

    def log_match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) log match probability, differentiable: rank by it, it does not saturate."""
        _check_samples(q, g, ("q", "g"))
        return _log_mean_sigmoid(self._logits(_at_least_float32(q), _at_least_float32(g)))

    def match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) match probability, differentiable."""
        _check_samples(q, g, ("q", "g"))
        return torch.sigmoid(self._logits(_at_least_float32(q), _at_least_float32(g))).mean((1, 3))


class ClosedFormSampledDistanceLoss(nn.Module):
    """PCME++: logit = b - a (|mu - mu'|^2 + sum sigma^2 + sum sigma'^2), binary cross-entropy over all pairs, no samples.

    smoothness_alpha weighs the same loss with pseudo-positives: pairs scored at least as high as their row's own match.
    The arguments are log VARIANCES.
    """

    def __init__(self, init_shift: float = 5, init_negative_scale: float = 5, vib_beta: float = 0.0,
                 smoothness_alpha: float = 0.0):
        super().__init__()
        _check_weights(vib_beta=vib_beta, smoothness_alpha=smoothness_alpha)
        self.shift = nn.Parameter(torch.full((1,), float(init_shift)))
        self.negative_scale = nn.Parameter(torch.full((1,), float(init_negative_scale)))
        self.vib_beta, self.smoothness_alpha = vib_beta, smoothness_alpha

    def forward(self, image_mean: Tensor, caption_mean: Tensor, image_log_var: Tensor, caption_log_var: Tensor,
                matched: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor | int]]:
        for name, mean, log_var in (("image", image_mean, image_log_var), ("caption", caption_mean, caption_log_var)):
            if mean.ndim != 2 or 0 in mean.shape or mean.shape != log_var.shape:
                raise ValueError(f"{name}_mean and {name}_log_var must be equal non-empty (N, D), "
                                 f"got {tuple(mean.shape)} and {tuple(log_var.shape)}")
        if image_mean.shape[1] != caption_mean.shape[1]:
            raise ValueError(f"D differs: {image_mean.shape[1]} and {caption_mean.shape[1]}")
        images, captions, image_l, caption_l = map(_at_least_float32, (image_mean, caption_mean, image_log_var, caption_log_var))
        matched = _check_matched(matched, len(images), len(captions), images).to(images.dtype)
        with torch.autocast(images.device.type, enabled=False):
            squared = (images.square().sum(1, keepdim=True) + captions.square().sum(1) - 2 * images @ captions.T).clamp(min=0)
            spread = image_l.exp().sum(1, keepdim=True) + caption_l.exp().sum(1)
            logits = self.shift - self.negative_scale * (squared + spread)
            loss = 2 * F.binary_cross_entropy_with_logits(logits, matched)
            pseudo = 0
            if self.smoothness_alpha:
                for way, target in ((logits, matched), (logits.T, matched.T)):
                    best, index = target.max(dim=1, keepdim=True)
                    above = way >= way.gather(1, index)
                    smooth = F.binary_cross_entropy_with_logits(way, torch.where(above, best, target))
                    loss, pseudo = loss + self.smoothness_alpha * smooth, pseudo + above.sum() - len(target)
            vib = images.new_zeros(())
            if self.vib_beta:
                vib = sum(-0.5 * (1 + l - m.square() - l.exp()).mean() for m, l in ((images, image_l), (captions, caption_l)))
                loss = loss + self.vib_beta * torch.where(vib > 1e4, 0.0, vib)      # the published guard against explosion
        parts = {"loss": loss, "n_pseudo_positives": torch.as_tensor(pseudo), "vib_loss": vib, "shift": self.shift[0],
                 "negative_scale": self.negative_scale[0]}
        return loss, {name: value.detach().clone() for name, value in parts.items()}


class TripletLoss(nn.Module):
    """Hinge on cosine similarities of the mean samples, same call as `MCSoftContrastiveLoss`.

    max_violation=True keeps the hardest negative of each query (VSE++), False sums over all negatives (VSE0).
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = True):
        super().__init__()
        self.margin, self.max_violation = margin, max_violation

    def forward(self, image_samples, caption_samples, image_logsigma=None, caption_logsigma=None, matched=None,
                **unused) -> tuple[Tensor, dict[str, Tensor]]:
        _check_samples(image_samples, caption_samples)
        images, captions = (F.normalize(_at_least_float32(x).mean(1), dim=-1) for x in (image_samples, caption_samples))
        matched = _check_matched(matched, len(images), len(captions), images) > 0
        scores, parts = images @ captions.T, {}
        for way, s, m in (("i2t", scores, matched), ("t2i", scores.T, matched.T)):
            row, column = m.nonzero(as_tuple=True)            # every match is an anchor
            cost = (self.margin + s[row] - s[row, column, None]).clamp(min=0).masked_fill(m[row], 0)
            parts[f"{way}_loss"] = (cost.amax(1) if self.max_violation else cost).sum()
        loss = parts["i2t_loss"] + parts["t2i_loss"]
        return loss, {name: value.detach() for name, value in {**parts, "loss": loss}.items()}


class InfoNCELoss(nn.Module):
    """Cross-entropy over the batch in both directions with a learned temperature, same call as `MCSoftContrastiveLoss`."""

    def __init__(self, init_temperature: float = 0.07):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(-math.log(init_temperature)))

    def forward(self, image_samples, caption_samples, image_logsigma=None, caption_logsigma=None, matched=None,
                **unused) -> tuple[Tensor, dict[str, Tensor]]:
        _check_samples(image_samples, caption_samples)
        images, captions = _at_least_float32(image_samples).mean(1), _at_least_float32(caption_samples).mean(1)
        loss = _info_nce(images, captions, _check_matched(matched, len(images), len(captions), images), self.log_scale.exp())
        return loss, {"loss": loss.detach(), "temperature": (-self.log_scale).exp().detach()}


def _info_nce(images: Tensor, captions: Tensor, matched: Tensor, scale: Tensor) -> Tensor:
    logits, loss = scale * F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T, 0.0
    for way, target in ((logits, matched), (logits.T, matched.T)):
        target = target.to(way.dtype)
        target = target / target.sum(1, keepdim=True).clamp(min=1e-12)
        loss = loss - (target * way.log_softmax(1)).sum(1).mean() / 2
    return loss


# ---------------------------------------------------------------- similarities at inference (larger = more similar)

def _cross(mu1, v1, mu2, v2):
    """sum ((mu1 - mu2)^2 + v1) / v2 for all pairs, as one matrix product."""
    left, right = torch.cat([mu1.square() + v1, mu1], 1), torch.cat([1 / v2, -2 * mu2 / v2], 1)
    return left @ right.T + (mu2.square() / v2).sum(1)


def _squared(mu1, mu2):
    return (mu1.square().sum(1, keepdim=True) + mu2.square().sum(1) - 2 * mu1 @ mu2.T).clamp(min=0)


def _kl_divergence(mu1, l1, mu2, l2):
    return 0.5 * (_cross(mu1, (2 * l1).exp(), mu2, (2 * l2).exp()) - mu1.shape[1]) + l2.sum(1) - l1.sum(1, keepdim=True)


def _kl_official(mu1, l1, mu2, l2):
    """As published: the sign of the log term is wrong, so this is no divergence."""
    return -_cross(mu1, (2 * l1).exp(), mu2, (2 * l2).exp()) - 2 * (l1.sum(1, keepdim=True) - l2.sum(1))


def _js(mu1, l1, mu2, l2):
    v1, v2 = (2 * l1).exp(), (2 * l2).exp()
    return -_cross(mu1, v1, mu2, v2) - _cross(mu2, v2, mu1, v1).T


def _elk(mu1, l1, mu2, l2):
    v = (2 * l1).exp()[:, None] + (2 * l2).exp()
    return -0.5 * ((mu1[:, None] - mu2).square() / v + v.log()).sum(-1)


def _bhattacharyya(mu1, l1, mu2, l2):
    v = (2 * l1).exp()[:, None] + (2 * l2).exp()
    return -((mu1[:, None] - mu2).square() / (4 * v) + 0.5 * ((v / 2).log() - l1[:, None] - l2)).sum(-1)


def _moment(mu1, l1, mu2, l2, shift, scale):
    """E sigmoid(2 (b - a |delta|)) with |delta|^2, delta ~ N(mu1 - mu2, v), v = v1 + v2, as a scaled chi-square.

    Its mean m = sum (d^2 + v) and variance s2 = sum (2 v^2 + 4 d^2 v) are matrix products; the chi-square with
    k = 2 m^2 / s2 degrees of freedom is a cubed Gaussian (Wilson-Hilferty), averaged at 16 Gauss-Hermite nodes.
    """
    v1, v2 = (2 * l1).exp(), (2 * l2).exp()
    m = _squared(mu1, mu2) + v1.sum(1, keepdim=True) + v2.sum(1)
    left = torch.cat([4 * mu1.square(), -8 * mu1 * v1, -8 * mu1, 4 * v1], 1)
    right = torch.cat([v2, mu2, mu2 * v2, mu2.square() + v2], 1)
    s2 = left @ right.T
    s2 += (2 * v1.square() + 4 * mu1.square() * v1).sum(1, keepdim=True)
    s2 += (2 * v2.square() + 4 * mu2.square() * v2).sum(1)
    h = s2.clamp(min=0) / (9 * m.square()).clamp(min=torch.finfo(m.dtype).tiny)      # 2 / (9 k)
    nodes, weights = np.polynomial.hermite_e.hermegauss(16)
    score = torch.zeros_like(m)
    for x, weight in zip(nodes.tolist(), (weights / weights.sum()).tolist()):
        squared = m * (1 - h + x * h.sqrt()).clamp(min=0) ** 3
        score += weight * torch.sigmoid(2 * (shift - scale * (squared + DISTANCE_EPS).sqrt()))
    return score


SAMPLED = {                                                   # q (n, J, D), g (m, J', D)
    "matching_prob": lambda s: s.sigmoid_().mean((1, 3)),
    "log_matching_prob": _log_mean_sigmoid,
}
POINTS = {                                                    # mu (n, D), mu (m, D)
    "mean": lambda q, g: q @ g.T,
    "l2": lambda q, g: -_squared(q, g),
    "min": lambda q, g: -(q[:, None] - g).square().amin(-1),
    "max": lambda q, g: -(q[:, None] - g).square().amax(-1),
}
GAUSSIANS = {                                                 # mu, logsigma (n, D), mu, logsigma (m, D)
    "wasserstein": lambda m1, l1, m2, l2: -_squared(torch.cat([m1, l1.exp()], 1), torch.cat([m2, l2.exp()], 1)),
    "elk": _elk,
    "bhattacharyya": _bhattacharyya,
    "kl": lambda *gaussians: -_kl_divergence(*gaussians),
    "reverse_kl": lambda m1, l1, m2, l2: -_kl_divergence(m2, l2, m1, l1).T,
    "kl_official": _kl_official,
    "reverse_kl_official": lambda m1, l1, m2, l2: _kl_official(m2, l2, m1, l1).T,
    "js": _js,
    "csd": lambda m1, l1, m2, l2: -(_squared(m1, m2) + (2 * l1).exp().sum(1, keepdim=True) + (2 * l2).exp().sum(1)),
    "match_prob_moment": _moment,
}
METHODS = (*SAMPLED, "matmul", *POINTS, *GAUSSIANS)


@torch.no_grad()
def pairwise_similarity(q: Tensor, g: Tensor, method: str = "matching_prob", q_logsigma: Tensor | None = None,
                        g_logsigma: Tensor | None = None, shift: float = 15.0, negative_scale: float = 15.0,
                        block: int | None = None, out: Tensor | None = None, device=None, dtype=None) -> Tensor:
    """(Nq, Ng) similarities, larger = more similar, in tiles of at most `block` x 4 `block` items (bounds the memory).

    matching_prob, log_matching_prob (ranks the same, never saturates), matmul: q, g are samples (N, J, D).
    mean, l2, min, max (over dimensions): q, g are mu (N, D). wasserstein (squared 2-Wasserstein), elk (log expected
    likelihood), bhattacharyya, kl = -KL(query || gallery), reverse_kl, js (= -(2 Jeffreys + 2 D)), csd (PCME++'s expected
    squared distance), match_prob_moment (the match probability at J -> infinity, without samples): mu and log standard
    deviations (N, D). kl_official and reverse_kl_official have the sign error of the public code.
    Computed on `device` in `dtype` (default: those of q; half precision is scored in float32); `out` (Nq, Ng) is filled.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    q, g = torch.as_tensor(q), torch.as_tensor(g)
    device, dtype = device or q.device, dtype or _at_least_float32(q).dtype
    sampled = method in SAMPLED or method == "matmul"
    for name, x in (("q", q), ("g", g)):
        if x.ndim != (3 if sampled else 2) or 0 in x.shape:
            raise ValueError(f"{name} must be non-empty {'(N, J, D) samples' if sampled else '(N, D)'} for {method}, "
                             f"got {tuple(x.shape)}")
    if q.shape[-1] != g.shape[-1]:
        raise ValueError(f"q and g must have the same D, got {q.shape[-1]} and {g.shape[-1]}")
    queries, gallery = [q], [g]
    if method in GAUSSIANS:
        for name, mu, logsigma, side in (("q_logsigma", q, q_logsigma, queries), ("g_logsigma", g, g_logsigma, gallery)):
            if logsigma is None or tuple(logsigma.shape) != tuple(mu.shape):
                raise ValueError(f"{name} must be {tuple(mu.shape)} for {method}, "
                                 f"got {None if logsigma is None else tuple(logsigma.shape)}")
            side.append(torch.as_tensor(logsigma))
    if out is None:
        out = torch.empty(len(q), len(g), dtype=dtype, device=device)
    elif tuple(out.shape) != (len(q), len(g)):
        raise ValueError(f"out must be ({len(q)}, {len(g)}), got {tuple(out.shape)}")
    shift, scale = float(shift), float(negative_scale)
    if block is None:
        wide = method not in SAMPLED and method not in ("min", "max", "elk", "bhattacharyya")
        block = 1024 if wide else 64 if method in SAMPLED else 32
    move = lambda tensors, part: [x[part].to(device, dtype) for x in tensors]      # noqa: E731
    for row in range(0, len(q), block):
        rows = slice(row, row + block)
        left = move(queries, rows)
        for column in range(0, len(g), 4 * block):
            columns = slice(column, column + 4 * block)
            right = move(gallery, columns)
            if method in SAMPLED:
                a, b = left[0], right[0]
                s = _distances(a.flatten(0, 1), b.flatten(0, 1)).mul_(-2 * scale).add_(2 * shift)
                tile = SAMPLED[method](s.view(*a.shape[:2], *b.shape[:2]))
            elif method == "matmul":                          # sum over J x J' of z . z'
                tile = left[0].sum(1) @ right[0].sum(1).T
            elif method == "match_prob_moment":
                tile = _moment(*left, *right, shift, scale)
            else:
                tile = {**POINTS, **GAUSSIANS}[method](*left, *right)
            out[rows, columns] = tile.to(out)
    return out


# ---------------------------------------------------------------- retrieval metrics

ROWS = 256                                                    # queries ranked at a time: bounds the memory


def _similarity(sim) -> Tensor:
    sim = _at_least_float32(torch.as_tensor(sim))
    if sim.ndim != 2 or 0 in sim.shape:
        raise ValueError(f"sim must be a non-empty (queries, gallery) matrix, got {tuple(sim.shape)}")
    if not all(torch.isfinite(part).all() for part in sim.split(ROWS)):
        raise ValueError("sim holds NaN or infinite values; they cannot be ranked")
    return sim


def _positives(sim: Tensor, positives) -> Tensor:
    positives = torch.as_tensor(positives, device=sim.device)
    if positives.shape != sim.shape:
        raise ValueError(f"positives must have the shape of sim, {tuple(sim.shape)}, got {tuple(positives.shape)}")
    return positives.bool()


def _with_positives(counts: Tensor, ignore_empty: bool = False) -> Tensor:
    """Indices of the queries to evaluate: those with a positive in the gallery."""
    empty = (counts == 0).nonzero().flatten()
    if len(empty) and (not ignore_empty or len(empty) == len(counts)):
        raise ValueError(f"{len(empty)} queries have no positive in the gallery, first {empty[:5].tolist()}")
    return (counts > 0).nonzero().flatten()


def _ranked(sim: Tensor, values: Tensor) -> Tensor:
    """`values` (queries, gallery) in the order of falling similarity; ties keep the gallery order."""
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


def recall_at_k(sim, positives, k: int) -> float:
    """Fraction of queries with a positive among the k most similar. Equal similarities rank by gallery index."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    sim = _similarity(sim)
    positives = _positives(sim, positives)
    return float((_best_ranks(sim, positives.__getitem__) < k).mean())


def _precision_at_r(sim, positives, ignore_empty: bool) -> tuple[np.ndarray, np.ndarray]:
    """R-Precision and AP@R of every query, R = its number of positives."""
    sim = _similarity(sim)
    positives = _positives(sim, positives)
    counts = positives.sum(1)
    rows = _with_positives(counts, ignore_empty)
    r_precision, map_r = [], []
    for part in rows.split(ROWS):
        r = counts[part]
        hits = _ranked(sim[part], positives[part])[:, :int(r.max())]
        place = torch.arange(1, hits.shape[1] + 1, device=sim.device)
        hits = (hits & (place <= r[:, None])).double()
        r_precision.append(hits.sum(1) / r)
        map_r.append((hits.cumsum(1) / place * hits).sum(1) / r)
    return torch.cat(r_precision).cpu().numpy(), torch.cat(map_r).cpu().numpy()


def r_precision(sim, positives, ignore_empty: bool = False) -> float:
    """Mean over queries of the fraction of positives among the first R, R = the query's number of positives."""
    return float(_precision_at_r(sim, positives, ignore_empty)[0].mean())


def map_at_r(sim, positives, ignore_empty: bool = False) -> float:
    """mAP@R: mean over queries of (1 / R) sum_{r <= R} precision@r * relevant_r."""
    return float(_precision_at_r(sim, positives, ignore_empty)[1].mean())


def eccv_metrics(sim, positives) -> dict[str, float]:
    """The metrics of ECCV Caption (arXiv:2204.03359) for one direction, fractions."""
    precision, average = _precision_at_r(sim, positives, False)
    return {"eccv_map_at_r": float(average.mean()), "eccv_rprecision": float(precision.mean()),
            "eccv_r1": recall_at_k(sim, positives, 1)}


def _rank_summary(ranks: np.ndarray, scale: float) -> dict[str, float]:
    recalls = {f"recall_{k}": scale * float((ranks < k).mean()) for k in (1, 5, 10)}
    return {**recalls, "rsum": sum(recalls.values()), "medr": float(np.floor(np.median(ranks)) + 1),
            "meanr": float(ranks.mean() + 1)}


def _folds(n: int, folds: int) -> list[slice]:
    if folds < 1 or n % folds:
        raise ValueError(f"folds must divide the number of images, {n}, got {folds}")
    return [slice(start, start + n // folds) for start in range(0, n, n // folds)]


def coco_recalls(sim, image_ids, caption_image_ids, folds: int | None = 5) -> dict[str, float]:
    """Recalls in PERCENT of sim (images, captions) in both directions, over all and as the mean over image blocks.

    {i2t,t2i}_{recall_1,recall_5,recall_10,rsum,medr,meanr}; with folds also nfold_...: consecutive blocks of
    images, each with its own captions ("1K" is 5 folds of COCO's 5,000 test images).
    """
    sim = _similarity(sim)
    image_ids, caption_ids = (torch.as_tensor(x, device=sim.device) for x in (image_ids, caption_image_ids))
    if image_ids.shape != sim.shape[:1] or caption_ids.shape != sim.shape[1:]:
        raise ValueError(f"image_ids and caption_image_ids must be ({sim.shape[0]},) and ({sim.shape[1]},), "
                         f"got {tuple(image_ids.shape)} and {tuple(caption_ids.shape)}")

    def both(sim, images, captions):
        i2t = _best_ranks(sim, lambda rows: images[rows, None] == captions)
        t2i = _best_ranks(sim.T, lambda rows: captions[rows, None] == images)
        return {f"{way}_{name}": value for way, ranks in (("i2t", i2t), ("t2i", t2i))
                for name, value in _rank_summary(ranks, 100.0).items()}

    result = both(sim, image_ids, caption_ids)
    if folds is not None:
        parts = []
        for rows in _folds(len(sim), folds):
            columns = torch.isin(caption_ids, image_ids[rows]).nonzero().flatten()
            parts.append(both(sim[rows][:, columns], image_ids[rows], caption_ids[columns]))
        result |= {f"nfold_{name}": float(np.mean([part[name] for part in parts])) for name in parts[0]}
    return result


def cub_metrics(sim, q_labels, g_labels, percent: bool = False) -> dict[str, float]:
    """One direction where all gallery items of the query's class are positives: recall_{1,5,10}, rsum,
    precision_{5,10,50,100} (divided by k even when the gallery is shorter), r_precision, map_r, medr, meanr.

    Fractions, or percent of all but medr and meanr.
    """
    sim = _similarity(sim)
    q, g = torch.as_tensor(q_labels, device=sim.device), torch.as_tensor(g_labels, device=sim.device)
    if q.shape != sim.shape[:1] or g.shape != sim.shape[1:]:
        raise ValueError(f"q_labels and g_labels must be ({sim.shape[0]},) and ({sim.shape[1]},), "
                         f"got {tuple(q.shape)} and {tuple(g.shape)}")
    scale = 100.0 if percent else 1.0
    positives = q[:, None] == g
    result = _rank_summary(_best_ranks(sim, positives.__getitem__), scale)
    hits = torch.zeros(4, dtype=torch.float64)
    for row in range(0, len(sim), ROWS):
        top = _ranked(sim[row:row + ROWS], positives[row:row + ROWS])
        hits += torch.stack([top[:, :k].sum().double() / k for k in (5, 10, 50, 100)]).cpu()
    precision, average = _precision_at_r(sim, positives, False)
    result |= {f"precision_{k}": scale * float(h) / len(sim) for k, h in zip((5, 10, 50, 100), hits)}
    return {**result, "r_precision": scale * float(precision.mean()), "map_r": scale * float(average.mean())}


def plausible_match_codes(instances: dict | list, image_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """COCO instance annotations -> codes (Ni, 90) uint8, bit category_id - 1, and annotated (Ni,) bool.

    instances: the JSON dict or its "annotations" list; an image without any instance is not annotated.
    """
    row = {int(image): index for index, image in enumerate(image_ids)}
    codes = np.zeros((len(row), 90), dtype=np.uint8)
    for item in instances["annotations"] if isinstance(instances, dict) else instances:
        if item["image_id"] in row:
            if not 1 <= item["category_id"] <= 90:
                raise ValueError(f"category_id must be in 1..90, got {item['category_id']}")
            codes[row[item["image_id"]], item["category_id"] - 1] = 1
    return codes, codes.any(1)


def pmrp(sim, codes, caption_image_index, zetas: Sequence[int] = (0, 1, 2), folds: int | None = None,
         drop_last: bool = False, annotated=None) -> dict[str, float | np.ndarray]:
    """Plausible-Match R-Precision (paper, section 4.1): items whose class codes differ in at most zeta bits match.

    sim (Ni, Nc); codes (Ni, K) binary; caption_image_index (Nc,) row of each caption's image; annotated (Ni,) bool,
    False: the image and its captions take no part. PERCENT means over zetas and queries (and folds, consecutive image
    blocks cut before unannotated images leave): {i2t,t2i}_pmrp, {i2t,t2i}_pmr1 (the top item is plausible). Without
    folds also {i2t,t2i}_rprecision, {i2t,t2i}_r1, arrays (len(zetas), queries).
    drop_last loses the last item of every full ranking, as the public ranking files do.

    Against human labels, plausible matches have precision 65 / 57 and recall 57 / 62 percent (ECCV Caption).
    """
    sim = _similarity(sim)
    n_images, n_captions = sim.shape
    codes = torch.as_tensor(codes, device=sim.device).float()
    owner = torch.as_tensor(caption_image_index, device=sim.device)
    keep = torch.ones(n_images, dtype=torch.bool) if annotated is None else torch.as_tensor(annotated).bool()
    if codes.ndim != 2 or len(codes) != n_images or owner.shape != (n_captions,) or keep.shape != (n_images,):
        raise ValueError(f"sim {tuple(sim.shape)} needs codes ({n_images}, K), caption_image_index ({n_captions},), annotated "
                         f"({n_images},); got {tuple(codes.shape)}, {tuple(owner.shape)}, {tuple(keep.shape)}")
    if ((codes != 0) & (codes != 1)).any():
        raise ValueError("codes must be 0 or 1")
    if owner.is_floating_point() or owner.min() < 0 or owner.max() >= n_images:
        raise ValueError(f"caption_image_index must be integers in 0..{n_images - 1}")
    if not len(zetas) or any(zeta < 0 or zeta != int(zeta) for zeta in zetas):
        raise ValueError(f"zetas must be integers >= 0, got {zetas!r}")
    keep = keep.to(sim.device)
    last = {}
    if drop_last:                                             # the last of a stable descending order
        for way, scores in (("i2t", sim), ("t2i", sim.T)):
            lows = [part.flip(1).argmin(1) for part in scores.split(ROWS)]
            last[way] = scores.shape[1] - 1 - torch.cat(lows)

    def score(rows: slice) -> dict[str, np.ndarray]:
        inside = torch.zeros_like(keep)
        inside[rows] = keep[rows]
        images, captions = inside.nonzero().flatten(), inside[owner].nonzero().flatten()
        result = {}
        for way, queries, gallery in (("i2t", images, captions), ("t2i", captions, images)):
            image_of = [(owner[x] if (way == "i2t") == (x is gallery) else x) for x in (queries, gallery)]
            gallery_codes, precision, first = codes[image_of[1]], [], []
            for part, image in zip(queries.split(ROWS), image_of[0].split(ROWS)):
                y = codes[image]
                hamming = (y @ (1 - gallery_codes).T + (1 - y) @ gallery_codes.T).clamp(max=254).to(torch.uint8)
                if drop_last:
                    hamming = hamming.masked_fill(gallery == last[way][part, None], 255)
                # dense columns: slices for whole ranges, copies only when images are left out
                scores = sim[part][:, gallery] if way == "i2t" else sim[:, part].T[:, gallery]
                ranked = _ranked(scores, hamming)
                place = torch.arange(ranked.shape[1], device=sim.device)
                block_p, block_1 = [], []
                for zeta in zetas:
                    plausible = ranked <= zeta
                    r = plausible.sum(1, keepdim=True)
                    _with_positives(r.flatten())
                    block_p.append((plausible & (place < r)).sum(1) / r.flatten().double())
                    block_1.append(plausible[:, 0])
                precision.append(torch.stack(block_p))
                first.append(torch.stack(block_1))
            result[f"{way}_rprecision"] = torch.cat(precision, 1).cpu().numpy()
            result[f"{way}_r1"] = torch.cat(first, 1).double().cpu().numpy()
        return result

    parts = [score(rows) for rows in _folds(n_images, folds or 1)]
    result = {f"{way}_{short}": 100 * float(np.mean([part[f"{way}_{name}"].mean() for part in parts]))
              for way in ("i2t", "t2i") for short, name in (("pmrp", "rprecision"), ("pmr1", "r1"))}
    return result if folds is not None else {**result, **parts[0]}


# ---------------------------------------------------------------- uncertainty

def uncertainty(logsigma, kind: str = "geometric_mean") -> Tensor:
    """(N, D) log standard deviations -> (N,): "geometric_mean" mean_k logsigma, "trace" sum_k sigma^2."""
    logsigma = _at_least_float32(torch.as_tensor(logsigma))
    if logsigma.ndim != 2:
        raise ValueError(f"logsigma must be (N, D), got {tuple(logsigma.shape)}")
    if kind not in ("geometric_mean", "trace"):
        raise ValueError(f"kind must be 'geometric_mean' or 'trace', got {kind!r}")
    return logsigma.mean(1) if kind == "geometric_mean" else (2 * logsigma).exp().sum(1)


def uncertainty_bins(u, metric, n_bins: int = 10) -> dict[str, np.ndarray | float]:
    """Queries sorted by rising uncertainty in n_bins bins of floor(N / n_bins) (the rest left out): bin means of metric and
    uncertainty, and the Pearson correlation of bin index and metric (strongly negative for a useful uncertainty)."""
    u, metric = np.asarray(u, dtype=np.float64), np.asarray(metric, dtype=np.float64)
    if u.ndim != 1 or u.shape != metric.shape or not 2 <= n_bins <= len(u):
        raise ValueError(f"u and metric must be equal (N,) with N >= n_bins >= 2, got {u.shape}, {metric.shape}, {n_bins}")
    order = np.argsort(u, kind="stable")[:len(u) // n_bins * n_bins].reshape(n_bins, -1)
    bins = metric[order].mean(1)
    correlation = np.corrcoef(np.arange(n_bins), bins)[0, 1] if bins.std() > 0 else 0.0
    return {"metric": bins, "uncertainty": u[order].mean(1), "correlation": float(correlation)}


@torch.no_grad()
def occlusion_curve(model: PCME, images: Tensor, ratios: Sequence[float], seed: int = 0) -> dict[float, float]:
    """Mean uncertainty of images with a grey (zero) rectangle over each ratio of the area, at one random place per image."""
    generator, result = torch.Generator().manual_seed(seed), {}
    height, width = images.shape[-2:]
    place = torch.rand(2, len(images), generator=generator)
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratios must be in [0, 1], got {ratio}")
        h, w = round(height * math.sqrt(ratio)), round(width * math.sqrt(ratio))
        top, left = ((place * torch.tensor([[height - h + 1], [width - w + 1]])).long()[:, :, None, None])
        y, x = torch.arange(height).view(1, -1, 1), torch.arange(width)
        hidden = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
        hidden = hidden.unsqueeze(1).to(images.device)
        out = model.encode_image(images.masked_fill(hidden, 0.0), num_samples=0)
        result[ratio] = uncertainty(out["logsigma"]).mean().item()
    return result


@torch.no_grad()
def word_drop_curve(model: PCME, tokens: Tensor, lengths: Tensor, ratios: Sequence[float], seed: int = 0) -> dict[float, float]:
    """Mean uncertainty of captions without each ratio of their words (the first and last token, the markers, stay)."""
    lengths = _check_lengths(tokens, lengths)
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    word = (position > 0) & (position < lengths.unsqueeze(1) - 1)
    draw = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)).to(tokens.device)
    turn = draw.masked_fill(~word, 2.0).argsort(1).argsort(1)          # words leave in a fixed random order
    result = {}
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratios must be in [0, 1], got {ratio}")
        gone = word & (turn < (word.sum(1, keepdim=True) * ratio).round())
        order = (gone | (position >= lengths.unsqueeze(1))).to(torch.uint8).sort(dim=1, stable=True).indices
        kept = lengths - gone.sum(1)
        shorter = tokens.gather(1, order).masked_fill(position >= kept.unsqueeze(1), 0)
        out = model.encode_text(shorter, kept, num_samples=0)
        result[ratio] = uncertainty(out["logsigma"]).mean().item()
    return result


# ---------------------------------------------------------------- tokens

# A caption is read once, from left to right; whatever is no break belongs to a word.
_BREAKS = r"""`+ | \.{2,} | -- | [«“‘„»”’] | [][(){}<>;@\#$%&?!*\u2012-\u2015]
    | [:,] (?!\d)                                             # 10:30 and 1,000 stay whole
    | \. (?= (?: [])}>'»”’\s] | (?<!\s)" )* $ )               # the period that ends the caption
    | (?<!\w) ' (?! (?:re|ve|ll|[mtsdn])\b ) (?=\w """        # an apostrophe that opens a quotation
_QUOTES = r"""(?P<opening> (?<![^\s(\[{<`«“‘„]) " | (?<=[\s(\[{<`«“‘„]) '' ) | (?P<closing> " | '' )"""
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
    those vocabularies were made. Sentences are not separated: only a period at the very end is split.
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
# The published recipes: train(..., **RECIPES["coco"]). Phase 1 keeps the backbone and the word vectors.
RECIPES = {
    "coco": {"epochs": (30, 30), "phases": ({"lr": 2e-4, "t_max": 30, "frozen": _FROZEN}, {"lr": 2e-5, "t_max": 30})},
    "cub": {"epochs": (10, 50), "phases": ({"lr": 1e-4, "t_max": 50, "frozen": _FROZEN}, {"lr": 1e-4, "t_max": 50})},
}


def train(model: PCME, criterion: nn.Module, loader: Iterable, *, epochs: int | Sequence[int],
          phases: Sequence[dict] = ({"lr": 2e-4},), optimizer: Callable = torch.optim.Adam, clip: float | None = 2.0,
          amp: torch.dtype | None = None, freeze_bn: bool = False, seed: int = 0,
          resume: dict | None = None) -> Iterator[dict[str, float]]:
    """The training loop; yields one dict of floats per step.

    loader gives (images, tokens, lengths) or (images, tokens, lengths, ids): with ids, captions of the same image in a
    batch count as its matches (the published code takes them for negatives); a 2-D fourth entry is `matched` itself.
    epochs: of each phase. A phase {"lr", "t_max" (default: its epochs), "frozen" (prefixes of parameter names)} starts a
    new `optimizer(parameters, lr=...)` (the paper: AdamP) and a cosine to 0 over t_max, stepped once per epoch. clip: gradient
    norm of the model, not of the criterion. Frozen batch norm still moves its statistics, as published, unless freeze_bn.
    amp: encoders under autocast; samples and loss stay in float32. seed draws the samples.
    In a process group the samples of all ranks are gathered, so that the loss and its gradient are those of the whole batch
    (ranks need equal batches). Send "state" for a snapshot; `resume` takes it and goes on to the same numbers.
    """
    counts = [epochs] * len(phases) if isinstance(epochs, int) else list(epochs)
    if len(counts) != len(phases) or min(counts, default=0) < 1:
        raise ValueError(f"epochs must be positive, one per phase ({len(phases)}), got {epochs}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    start, step = {"phase": 0, "epoch": 0, "batch": 0, "step": 0}, 0
    if resume:
        model.load_state_dict(resume["model"])
        criterion.load_state_dict(resume["criterion"])
        generator.set_state(resume["generator"])
        start, step = resume["position"], resume["position"]["step"]
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for phase in range(start["phase"], len(phases)):
        settings = phases[phase]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name] and not name.startswith(tuple(settings.get("frozen", ()))))
        weights = [p for p in model.parameters() if p.requires_grad]
        own = list(criterion.parameters())
        steps = optimizer(weights + own, lr=settings["lr"])
        if resume and phase == start["phase"]:
            steps.load_state_dict(resume["optimizer"])
            scaler.load_state_dict(resume["scaler"])
        for epoch in range(start["epoch"] if phase == start["phase"] else 0, counts[phase]):
            lr = settings["lr"] * 0.5 * (1 + math.cos(math.pi * epoch / settings.get("t_max", counts[phase])))
            for group in steps.param_groups:
                group["lr"] = lr
            model.train()
            if freeze_bn:
                for module in model.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
            skip = start["batch"] if (phase, epoch) == (start["phase"], start["epoch"]) else 0
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(sum(counts[:phase]) + epoch, skip)
                batches = enumerate(loader, skip)
            else:
                batches = ((index, batch) for index, batch in enumerate(loader) if index >= skip)
            for index, batch in batches:
                images, tokens, lengths, *ids = (None if part is None else part.to(device) for part in batch)
                with torch.autocast(device.type, amp, enabled=amp is not None):
                    out = model(images, tokens, lengths, num_samples=0)
                j = getattr(model.img_enc, "n_samples_inference", 7)
                sides = []
                for side in ("image", "caption"):
                    mu, logsigma = _gathered(out[f"{side}_mu"].float()), _gathered(out[f"{side}_logsigma"].float())
                    sides.append((sample_gaussian(mu, logsigma, j, generator) if j else mu.unsqueeze(1), logsigma, mu))
                matched = None
                if ids:
                    matched = ids[0] if ids[0].ndim == 2 else (lambda x: x[:, None] == x)(_gathered(ids[0]))
                (zi, li, mi), (zc, lc, mc) = sides
                loss, parts = criterion(zi, zc, li, lc, matched, generator=generator, image_mu=mi, caption_mu=mc)
                steps.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(steps)
                for parameters, divisor in ((weights, 1), (own, world)) if world > 1 else ():
                    for parameter in parameters:
                        if parameter.grad is not None:
                            dist.all_reduce(parameter.grad)
                            parameter.grad /= divisor
                norm = nn.utils.clip_grad_norm_(weights, math.inf if clip is None else clip)
                scaler.step(steps)
                scaler.update()
                step += 1
                values = {**parts, "grad_norm": norm.detach()}
                floats = torch.stack([v.float().to(device).reshape(()) for v in values.values()]).tolist()
                if (yield {"step": step, "phase": phase, "epoch": epoch, "lr": lr, **dict(zip(values, floats))}) == "state":
                    yield {"model": model.state_dict(), "criterion": criterion.state_dict(), "optimizer": steps.state_dict(),
                           "scaler": scaler.state_dict(), "generator": generator.get_state(),
                           "position": {"phase": phase, "epoch": epoch, "batch": index + 1, "step": step}}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable[name])


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; only the own rows carry a gradient (the ranks' parameter gradients are summed)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


# ---------------------------------------------------------------- demonstration

def attribute_world(count: int, generator: torch.Generator, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images with 6 attributes of 6 values and captions naming some: features (N, 64), captions (N, 36), values (N, 6)."""
    values = torch.randint(6, (count, 6), generator=generator)
    hot = F.one_hot(values, 6).float()
    order = torch.rand(count, 6, generator=generator).argsort(1)
    mentioned = order < torch.randint(1, 7, (count, 1), generator=generator)
    image = hot.flatten(1) @ mix + 0.1 * torch.randn(count, 64, generator=generator)
    return image, (hot * mentioned.unsqueeze(-1)).flatten(1), values


if __name__ == "__main__":
    g = torch.Generator().manual_seed(0)
    W = torch.randn(36, 64, generator=g) / math.sqrt(6)
    tower = lambda d: nn.Sequential(nn.Linear(d, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), GaussianHead(256, 32, -2.0))  # noqa: E731,E501
    demo = PCME(tower(64), tower(36))
    draws = ((lambda i, c, v: (i, c, None))(*attribute_world(128, g, W)) for _ in range(200))
    for last in train(demo, MCSoftContrastiveLoss(15, 15, vib_beta=1e-5), draws, epochs=1, phases=({"lr": 1e-3},), clip=None):
        pass
    _, test_captions, _ = attribute_world(2000, g, W)
    u = uncertainty(demo.encode_text(test_captions)["logsigma"].detach())
    mentions = test_captions.sum(1)
    print("A caption that says less is more uncertain: mean log sigma by attributes named after 200 steps")
    print("  " + "  ".join(f"{m}: {u[mentions == m].mean():.2f}" for m in range(1, 7)))
