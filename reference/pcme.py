r"""PCME: probabilistic embeddings for cross-modal retrieval.

Chun, Oh, Sampaio de Rezende, Kalantidis, Larlus, "Probabilistic Embeddings for Cross-Modal
Retrieval", CVPR 2021, arXiv:2101.05068. Successor: PCME++ (arXiv:2305.18171), here
`ClosedFormSampledDistanceLoss`.

An image fits many captions, and a vague caption fits many images. PCME maps each item to a Gaussian
N(mu, diag sigma^2), |mu| = 1, in one D-dimensional space. Two items match with probability

    p = E sigmoid(2 (b - a |z - z'|)),  z ~ N(mu, sigma^2),  z' ~ N(mu', sigma'^2),  a, b learned,

estimated from all J^2 pairs of J samples each (the factor 2 is that of the published code). The
loss is the negative log-likelihood of match / no match over all pairs of a batch. sigma needs no
label: it grows for vague captions and occluded images, and predicts where retrieval fails.

What to copy: `sample_gaussian`, `MCSoftContrastiveLoss` and `pairwise_similarity`, for any two
towers that give (mu, log sigma); or only the metrics.

    >>> head_i, head_t = GaussianHead(512, 64), GaussianHead(300, 64)      # on any pair of towers
    >>> criterion = MCSoftContrastiveLoss(init_shift=5, init_negative_scale=5, vib_beta=1e-4)
    >>> image, text = head_i(torch.randn(8, 512)), head_t(torch.randn(8, 300))
    >>> samples = sample_gaussian(*image, 7), sample_gaussian(*text, 7)
    >>> loss, parts = criterion(*samples, image[1], text[1])
    >>> loss.backward()
    >>> pairwise_similarity(image[0], text[0], "csd", image[1], text[1]).shape
    torch.Size([8, 8])

`logsigma` is the log STANDARD DEVIATION, but for the KL term, where the published code reads the
same number as a log variance (`kl_convention`), and for PCME++, whose heads give log variances.
Losses are SUMS over pairs: a learning rate found at one batch size does not suit another.

Reproduces: on COCO the paper reports the best plausible-match R-Precision (1K: 45.0 / 46.0), with
R@1 68.8 / 54.6.
"""

import copy
import functools
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


# ---------------------------------------------------------------- checks

def _check_choice(accepted: Iterable[str], **argument: str) -> None:
    (name, value), = argument.items()
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")


def _check_count(least: int = 1, /, **arguments: int) -> None:
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_finite(**arguments: float) -> None:
    for name, value in arguments.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def _check_shape(*shape: int, **arrays: Tensor | None) -> None:
    for name, x in arrays.items():
        given = (*x.shape,) if hasattr(x, "shape") else type(x).__name__
        if given != shape:
            raise ValueError(f"{name} must be {shape}, got {given}")


def _check_indices(low: int, high: int, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name} must be integers, got {x.dtype}")
        least, most = torch.aminmax(x.long())
        least, most = torch.stack([least, most]).tolist()                  # one wait of the host
        if least < low or most > high:
            raise ValueError(f"{name} must be in {low}..{high}, got {least}..{most}")


def _check_binary(**arrays: Tensor) -> None:
    for name, x in arrays.items():
        if x.dtype != torch.bool and ((x != 0) & (x != 1)).any():
            raise ValueError(f"{name} must be 0 or 1")


def _check_items(ndim: int, **tensors: Tensor) -> None:
    """Non-empty floating-point (N, D) or (N, J, D) tensors with the same D."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {type(x).__name__} "
                            f"{getattr(x, 'dtype', '')}")
        if x.ndim != ndim or 0 in x.shape:
            kind = "(N, J, D) samples" if ndim == 3 else "(N, D)"
            raise ValueError(f"{name} must be non-empty {kind}, got {(*x.shape,)}")
    if len(widths := {x.shape[-1] for x in tensors.values()}) > 1:
        raise ValueError(f"{', '.join(tensors)} must have the same D, got {sorted(widths)}")


def _check_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    if tokens.ndim != 2 or not len(tokens):
        raise ValueError(f"tokens must be non-empty (B, T), got {(*tokens.shape,)}")
    lengths = _tensor(tokens.device, len(tokens), lengths=lengths)
    _check_indices(1, tokens.shape[1], lengths=lengths)
    return lengths.long()


def _tensor(device: torch.device | None = None, /, *shape: int, **array) -> Tensor:
    """The named array as a tensor on `device`, of `shape` where given."""
    (name, value), = array.items()
    try:
        reversed_view = isinstance(value, np.ndarray) and min(value.strides, default=0) < 0
        tensor = torch.as_tensor(value.copy() if reversed_view else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or an array of numbers, got "
                        f"{type(value).__name__}") from None
    if shape:
        _check_shape(*shape, **{name: tensor})
    return tensor.to(device=device)


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in their common dtype, at least float32."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors), torch.float32)
    return [x.to(dtype) for x in tensors]


# ---------------------------------------------------------------- heads (paper, section 3.2)

class MultiHeadSelfAttention(nn.Module):
    """Attention pooling: softmax_t(tanh(x W1^T) W2^T) weights the T items of x (B, T, d_in).

    Returns pooled (B, n_head, d_in), without the middle axis when n_head is 1, and the weights
    (B, T, n_head). mask (B, T) bool is True where x is padding; a row must keep at least one item.
    """

    def __init__(self, n_head: int, d_in: int, d_hidden: int):
        super().__init__()
        _check_count(n_head=n_head, d_in=d_in, d_hidden=d_hidden)
        self.w_1 = nn.Linear(d_in, d_hidden, bias=False)
        self.w_2 = nn.Linear(d_hidden, n_head, bias=False)
        nn.init.xavier_uniform_(self.w_1.weight)
        nn.init.xavier_uniform_(self.w_2.weight)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        _check_shape(*x.shape[:2], self.w_1.in_features, x=x)
        scores = self.w_2(torch.tanh(self.w_1(x)))
        if mask is not None:
            _check_shape(*x.shape[:2], mask=mask)
            if mask.dtype != torch.bool or mask.all(1).any():
                raise ValueError("mask must be bool and leave an item of every row")
            scores = scores.masked_fill(mask.unsqueeze(-1), -math.inf)
        attention = scores.softmax(dim=1)
        pooled = attention.transpose(1, 2) @ x
        return (pooled.squeeze(1) if pooled.shape[1] == 1 else pooled), attention


class PIENet(nn.Module):
    """LayerNorm(out + sigmoid(Linear(attention pooling of x))): a global state, refined locally.

    out (B, d_out), x (B, T, d_in) -> out, attention (B, T, K), residual; K = n_embeds > 1 adds an
    axis (B, K, d_out) to out and residual. Not L2-normalised: the encoders do that.
    """

    def __init__(self, n_embeds: int, d_in: int, d_out: int, d_h: int, dropout: float = 0.0):
        super().__init__()
        self.attention = MultiHeadSelfAttention(n_embeds, d_in, d_h)
        self.fc = _xavier_linear(d_in, d_out)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_out)

    def forward(self, out: Tensor, x: Tensor,
                pad_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        pooled, attention = self.attention(x, pad_mask)
        _check_shape(x.shape[0], self.fc.out_features, out=out)
        residual = self.dropout(torch.sigmoid(self.fc(pooled)))
        state = out if residual.ndim == 2 else out.unsqueeze(1)
        return self.layer_norm(state + residual), attention, residual


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
        _check_shape(x.shape[0], x.shape[2], pooled=pooled)
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
        _check_count(d_in=d_in, d_out=d_out)
        self.mean, self.logsigma = nn.Linear(d_in, d_out), nn.Linear(d_in, d_out)
        nn.init.constant_(self.logsigma.bias, init_logsigma)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _check_shape(x.shape[0], self.mean.in_features, x=x)
        return F.normalize(self.mean(x), dim=-1), self.logsigma(x)


def _xavier_linear(d_in: int, d_out: int) -> nn.Linear:
    layer = nn.Linear(d_in, d_out)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _sentence_state(rnn: nn.GRU, x: Tensor, lengths: Tensor, final_state: str) -> Tensor:
    """(B, D) state of a bidirectional GRU over right-padded x (B, T, d).

    "last_position" reads both directions at the last word, as the published model does: its
    backward half has seen that one word only. "both_ends" reads it at the first word.
    """
    if final_state == "both_ends":
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), True, enforce_sorted=False)
        return rnn(packed)[1].transpose(0, 1).flatten(1)
    forward, backward = ([getattr(rnn, f"{name}_l0{way}") for name in
                          ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
                         for way in ("", "_reverse"))
    start, last = x.new_zeros(1, x.shape[0], rnn.hidden_size), lengths - 1
    rows = torch.arange(x.shape[0], device=x.device)
    states = torch.gru(x, start, forward, True, 1, 0.0, rnn.training, False, True)[0]
    return torch.cat([states[rows, last], torch.gru_cell(x[rows, last], start[0], *backward)], 1)


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
        _check_count(cnn_dim=cnn_dim, embed_dim=embed_dim)
        _check_count(0, n_samples_inference=n_samples_inference)
        self.n_samples_inference = n_samples_inference
        self.cnn = backbone
        self.fc = nn.Linear(cnn_dim, embed_dim)
        self.pie_net = PIENet(1, cnn_dim, embed_dim, cnn_dim // 2)
        self.uncertain_net = UncertaintyModuleImage(cnn_dim, embed_dim, cnn_dim // 2)

    def forward(self, images: Tensor, generator: torch.Generator | None = None,
                num_samples: int | None = None) -> dict[str, Tensor]:
        features, width = self.cnn(images), self.fc.in_features
        if features.ndim not in (2, 4) or features.shape[1] != width or 0 in features.shape:
            raise ValueError(f"backbone must give non-empty (B, {width}, H, W) or (B, {width}), "
                             f"got {(*features.shape,)}")
        local = features.reshape(*features.shape[:2], -1).transpose(1, 2)
        pooled = local.mean(1)
        mean = self.pie_net(self.fc(pooled), local)
        return _encoded(self, mean, self.uncertain_net(pooled, local), num_samples, generator)


class EncoderText(nn.Module):
    """Gaussians of token sequences (B, T), padded on the right, lengths (B,) int64 in any order.

    Two bidirectional GRUs (mean and uncertainty) give the sentence states; attention reads the word
    vectors. Returns the dict of `EncoderImage`, attention over the T words.
    final_state: "last_position" (published) or "both_ends", see `_sentence_state`.
    """

    def __init__(self, vocab_size: int, word_dim: int = 300, embed_dim: int = 1024,
                 final_state: str = "last_position", n_samples_inference: int = 7):
        super().__init__()
        _check_count(vocab_size=vocab_size, word_dim=word_dim, embed_dim=embed_dim)
        _check_count(0, n_samples_inference=n_samples_inference)
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
        _check_indices(0, self.embed.num_embeddings - 1, tokens=tokens)
        words = self.embed(tokens.long())
        pad_mask = torch.arange(tokens.shape[1], device=tokens.device) >= lengths.unsqueeze(1)
        state = _sentence_state(self.rnn, words, lengths, self.final_state)
        mean = self.pie_net(state, words, pad_mask)
        uncertain = self.uncertain_net(words, pad_mask, lengths)
        return _encoded(self, mean, uncertain, num_samples, generator)


def _encoded(encoder: nn.Module, mean: tuple, uncertain: dict, num_samples: int | None,
             generator: torch.Generator | None) -> dict[str, Tensor]:
    """What an encoder returns, from (out, attention, residual) and {"logsigma", "attention"}."""
    mu, logsigma = F.normalize(mean[0], dim=-1), uncertain["logsigma"]
    j = getattr(encoder, "n_samples_inference", 7) if num_samples is None else num_samples
    embedding = sample_gaussian(mu, logsigma, j, generator) if j else mu
    return {"embedding": embedding, "mu": mu, "logsigma": logsigma, "attention": mean[1],
            "residual": mean[2], "uncertainty_attention": uncertain["attention"]}


class PCME(nn.Module):
    """An image tower and a text tower: encoders as above, or modules that give (mu, logsigma).

    Such a module is called with the images or the tokens alone; lengths go to `EncoderText`.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module):
        super().__init__()
        self.img_enc, self.txt_enc = image_encoder, text_encoder

    def encode_image(self, images: Tensor, **options) -> dict[str, Tensor]:
        return self._encode(self.img_enc, (images,), **options)

    def encode_text(self, tokens: Tensor, lengths: Tensor | None = None, **options) -> dict:
        return self._encode(self.txt_enc, (tokens, lengths), **options)

    @staticmethod
    def _encode(encoder, inputs, generator=None, num_samples=None):
        if isinstance(getattr(encoder, "_orig_mod", encoder), (EncoderImage, EncoderText)):
            return encoder(*inputs, generator=generator, num_samples=num_samples)
        mu, logsigma = encoder(inputs[0])
        uncertain = {"logsigma": logsigma, "attention": None}
        return _encoded(encoder, (mu, None, None), uncertain, num_samples, generator)

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

        All names and shapes must fit, or the model stays as it is; batch norm's step counters may
        be missing.
        """
        try:
            weights = {name.removeprefix("module."): value for name, value
                       in state_dict.get("model", state_dict).items()}
            copy.deepcopy(self).load_state_dict(weights)
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"state_dict does not fit: {str(error)[:600]}") from None
        self.load_state_dict(weights)


# ---------------------------------------------------------------- sampling

def sample_gaussian(mu: Tensor, logsigma: Tensor, num_samples: int,
                    generator: torch.Generator | None = None, antithetic: bool = False,
                    eps: Tensor | None = None) -> Tensor:
    """z = mu + exp(logsigma) * eps (paper, section 3.2): (B, D) -> (B, J, D), not normalised.

    eps (B, J, D) replaces the draw; antithetic=True draws pairs eps, -eps. Half precision gives
    float32 samples.
    """
    _check_items(2, mu=mu)
    _check_shape(*mu.shape, logsigma=logsigma)
    _check_count(num_samples=num_samples)
    (mu, logsigma), (count, dim) = _wide(mu, logsigma), mu.shape
    if eps is None:
        drawn = -(-num_samples // 2) if antithetic else num_samples
        # No argument generator=None: compiled, it would allow one shape only.
        source = {} if generator is None else {"generator": generator}
        eps = torch.randn(count, drawn, dim, device=mu.device, dtype=mu.dtype, **source)
        if antithetic:
            eps = torch.cat([eps, -eps], dim=1)[:, :num_samples]
    _check_items(3, eps=eps)
    _check_shape(count, num_samples, dim, eps=eps)
    return torch.addcmul(mu.unsqueeze(1), logsigma.exp().unsqueeze(1), eps.to(mu))


# ---------------------------------------------------------------- losses

def _squared(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m): |x - y|^2 by one matrix product, also under autocast."""
    norm = torch.linalg.vector_norm
    with torch.autocast(x.device.type, enabled=False):
        product = torch.addmm(norm(y, dim=-1).square(), x, y.T, alpha=-2)
        return product.add_(norm(x, dim=-1, keepdim=True).square()).clamp_(min=0)


def _logits(q: Tensor, g: Tensor, shift: Tensor | float, scale: Tensor | float) -> Tensor:
    """(n, J, D), (m, J', D) -> (n, J, m, J'): 2 (b - a d) with d = sqrt(|z - z'|^2 + eps)."""
    d = _squared(q.flatten(0, 1), g.flatten(0, 1)).add_(DISTANCE_EPS).sqrt_()
    return (-2 * scale * d).add_(2 * shift).view(*q.shape[:2], *g.shape[:2])


def _log_mean_sigmoid(logits: Tensor) -> Tensor:
    """log of the mean over the sample pairs (axes 1 and 3), with all digits near 0 and near 1."""
    count = logits.shape[1] * logits.shape[3]
    miss = (-logits).sigmoid().mean((1, 3))
    unlikely = torch.logsumexp(F.logsigmoid(logits), dim=(1, 3)) - math.log(count)
    return torch.where(miss < 0.5, torch.log1p(-miss.clamp(max=0.5)), unlikely)


def _check_matched(matched: Tensor | None, images: Tensor, captions: Tensor) -> Tensor:
    """(Ni, Nc) bool for the diagonal and for hard labels, floats in [0, 1] for soft ones."""
    count, other = len(images), len(captions)
    if matched is None:
        if count != other:
            raise ValueError(f"matched is needed for {count} images and {other} captions")
        return torch.eye(count, dtype=torch.bool, device=images.device)
    matched = _tensor(images.device, count, other, matched=matched)
    if not ((matched >= 0) & (matched <= 1)).all():
        raise ValueError("matched must be in [0, 1]")
    return matched if matched.dtype == torch.bool else matched.to(images.dtype)


def _kl_to_standard(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, 1)) of every item and dimension."""
    return -0.5 * (1 + log_var - mean.square() - log_var.exp())


class _PairLoss(nn.Module):
    """Learned b (`shift`) and a (`negative_scale`) and the weights of further terms."""

    def __init__(self, shift: float, negative_scale: float, **weights: float):
        super().__init__()
        _check_finite(init_shift=shift, init_negative_scale=negative_scale, **weights)
        self.shift, self.negative_scale = (nn.Parameter(torch.full((1,), float(x)))
                                           for x in (shift, negative_scale))
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must be at least 0, got {weight}")
            setattr(self, name, weight)

    def _reported(self, loss: Tensor, **parts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts |= {"loss": loss, "shift": self.shift[0], "negative_scale": self.negative_scale[0]}
        return loss, {name: value.detach().clone() for name, value in parts.items()}


class MCSoftContrastiveLoss(_PairLoss):
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
        super().__init__(init_shift, init_negative_scale, uniform_lambda=uniform_lambda,
                         vib_beta=vib_beta, deterministic_weight=deterministic_weight)
        _check_choice(("sum", "mean", "none"), reduction=reduction)
        _check_choice(("official", "std"), kl_convention=kl_convention)
        _check_count(num_samples=num_samples, block=1 if block is None else block)
        self.num_samples, self.block = num_samples, block
        self.reduction, self.kl_convention = reduction, kl_convention

    def forward(self, image_samples: Tensor, caption_samples: Tensor,
                image_logsigma: Tensor | None = None, caption_logsigma: Tensor | None = None,
                matched: Tensor | None = None, uniform_rows: Tensor | None = None,
                generator: torch.Generator | None = None, *, image_mu: Tensor | None = None,
                caption_mu: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Samples (Ni, J, D), (Nc, J, D) -> loss and its parts as detached 0-d tensors.

        matched (Ni, Nc): True, 1 or a degree in [0, 1] where the pair matches; None: the diagonal.
        """
        _check_items(3, image_samples=image_samples, caption_samples=caption_samples)
        images, captions = _wide(image_samples, caption_samples)
        matched = _check_matched(matched, images, captions)
        sides = (("image", images, image_logsigma, image_mu),
                 ("caption", captions, caption_logsigma, caption_mu))
        if self.block is None or self.block >= len(images):
            nll, positive = self._nll(images, captions, matched)
        else:
            parts = [checkpoint(self._nll, i, captions, m, use_reentrant=False)
                     for i, m in zip(images.split(self.block), matched.split(self.block))]
            nll, positive = map(torch.cat, zip(*parts))
        total, positive = nll.sum(), positive.sum()
        uniform = vib = deterministic = images.new_zeros(())
        if self.uniform_lambda:
            x = torch.cat([images.flatten(0, 1), captions.flatten(0, 1)])
            uniform = _uniformity(x, uniform_rows, generator)
        if self.vib_beta:
            vib = sum(self._kl(*side) for side in sides)
        if self.deterministic_weight:
            means = (z.mean(1) if mu is None else mu for _, z, _, mu in sides)
            deterministic = _info_nce(_cosines(*means) / 0.07, matched)
        extra = (self.uniform_lambda * uniform + self.vib_beta * vib
                 + self.deterministic_weight * deterministic)
        loss = {"sum": 2 * total + extra, "mean": 2 * total / nll.numel() + extra,
                "none": 2 * nll}[self.reduction]
        # both directions are equal by symmetry; these are the published names
        ways = {f"{way}_{name}": value for way in ("i2t", "t2i") for name, value in
                (("loss", total), ("pos_loss", positive), ("neg_loss", total - positive))}
        return self._reported(loss, **ways, uniform_loss=uniform, vib_loss=vib)

    def _pair_logits(self, q: Tensor, g: Tensor) -> Tensor:
        _check_items(3, q=q, g=g)
        q, g = _wide(q, g)
        return _logits(q, g, self.shift.to(q.dtype), self.negative_scale.to(q.dtype))

    def _nll(self, images: Tensor, captions: Tensor, matched: Tensor) -> tuple[Tensor, Tensor]:
        """(Ni, Nc) negative log-likelihoods, and the share of each that is due to matching."""
        s = self._pair_logits(images, captions)
        if matched.dtype == torch.bool:                      # one log-likelihood per pair is enough
            sign = torch.where(matched, 1.0, -1.0).to(s.dtype)[:, None, :, None]
            nll = -_log_mean_sigmoid(sign * s)
            return nll, nll * matched
        positive = -matched * _log_mean_sigmoid(s)
        return positive - (1 - matched) * _log_mean_sigmoid(-s), positive

    def _kl(self, side: str, samples: Tensor, logsigma: Tensor | None, mu: Tensor | None) -> Tensor:
        mean = samples.mean(1)
        if self.kl_convention == "std" and mu is not None:
            _check_shape(*mean.shape, **{f"{side}_mu": mu})
            mean = mu
        _check_shape(*mean.shape, **{f"{side}_logsigma": logsigma})
        log_var = logsigma if self.kl_convention == "official" else 2 * logsigma
        return _kl_to_standard(mean.to(samples.dtype), log_var.to(samples.dtype)).sum()

    def log_match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) log match probability: ranks without saturating."""
        return _log_mean_sigmoid(self._pair_logits(q, g))

    def match_prob(self, q: Tensor, g: Tensor) -> Tensor:
        """(Nq, J, D), (Ng, J', D) -> (Nq, Ng) match probability, differentiable."""
        return self._pair_logits(q, g).sigmoid().mean((1, 3))


def _uniformity(x: Tensor, rows: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """log mean_{p<q} exp(-2 |x_p - x_q|^2) over some rows of x; None: all, or 128 drawn ones."""
    if rows is None and len(x) > 128:                         # the published rule: with replacement
        device = x.device if generator is None else generator.device
        rows = torch.randint(len(x), (128,), generator=generator, device=device)
    rows = torch.arange(len(x)) if rows is None else _tensor(uniform_rows=rows)
    if rows.ndim != 1 or len(rows) < 2:
        raise ValueError(f"uniform_rows must be (N,) with at least 2 rows, got {(*rows.shape,)}")
    _check_indices(0, len(x) - 1, uniform_rows=rows)
    squared = F.pdist(x[rows.to(x.device, torch.int64)]).square()        # gradient 0 at duplicates
    return torch.logsumexp(-2 * squared, 0) - math.log(len(squared))


class ClosedFormSampledDistanceLoss(_PairLoss):
    """PCME++: cross-entropy over all pairs of b - a (|mu - mu'|^2 + sum sigma^2 + sum sigma'^2).

    smoothness_alpha weighs the same loss with pseudo-positives: pairs scored at least as high as
    their row's own match. No samples are drawn. The arguments are log VARIANCES.
    """

    def __init__(self, init_shift: float = 5, init_negative_scale: float = 5, vib_beta: float = 0.0,
                 smoothness_alpha: float = 0.0):
        super().__init__(init_shift, init_negative_scale, vib_beta=vib_beta,
                         smoothness_alpha=smoothness_alpha)

    def forward(self, image_mean: Tensor, caption_mean: Tensor, image_log_var: Tensor,
                caption_log_var: Tensor,
                matched: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """(Ni, D), (Nc, D) -> loss (mean over pairs, times 2) and its parts as detached tensors."""
        _check_items(2, image_mean=image_mean, caption_mean=caption_mean)
        _check_shape(*image_mean.shape, image_log_var=image_log_var)
        _check_shape(*caption_mean.shape, caption_log_var=caption_log_var)
        images, captions, image_l, caption_l = _wide(image_mean, caption_mean, image_log_var,
                                                     caption_log_var)
        matched = _check_matched(matched, images, captions).to(images.dtype)
        pseudo, vib = matched.new_zeros((), dtype=torch.int64), images.new_zeros(())
        csd = _csd(images, image_l / 2, captions, caption_l / 2)
        logits = self.shift + self.negative_scale * csd
        loss = 2 * F.binary_cross_entropy_with_logits(logits, matched)
        ways = ((logits, matched), (logits.T, matched.T)) if self.smoothness_alpha else ()
        for way, target in ways:
            best, index = target.max(dim=1, keepdim=True)
            above = way >= way.gather(1, index)
            smooth = F.binary_cross_entropy_with_logits(way, torch.where(above, best, target))
            loss = loss + self.smoothness_alpha * smooth
            pseudo = pseudo + above.sum() - len(target)
        if self.vib_beta:                                 # left out where it explodes, as published
            vib = sum(_kl_to_standard(*side).mean()
                      for side in ((images, image_l), (captions, caption_l)))
            loss = loss + self.vib_beta * torch.where(vib > 1e4, 0.0, vib)
        return self._reported(loss, n_pseudo_positives=pseudo, vib_loss=vib)


class _CosineLoss(nn.Module):
    """Baselines on the cosines of the mean samples, with the call of `MCSoftContrastiveLoss`."""

    def forward(self, image_samples: Tensor, caption_samples: Tensor, image_logsigma=None,
                caption_logsigma=None, matched: Tensor | None = None,
                **unused) -> tuple[Tensor, dict[str, Tensor]]:
        _check_items(3, image_samples=image_samples, caption_samples=caption_samples)
        images, captions = (x.mean(1) for x in _wide(image_samples, caption_samples))
        parts = self.parts(_cosines(images, captions), _check_matched(matched, images, captions))
        return parts["loss"], {name: value.detach().clone() for name, value in parts.items()}


class TripletLoss(_CosineLoss):
    """Hinge max(0, margin + negative - positive) for every match, in both directions.

    max_violation=True takes the hardest negative of each (VSE++), False sums over all (VSE0).
    """

    def __init__(self, margin: float = 0.2, max_violation: bool = True):
        super().__init__()
        _check_finite(margin=margin)
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
        if not 0 < init_temperature < math.inf:
            raise ValueError(f"init_temperature must be above 0, got {init_temperature}")
        self.log_scale = nn.Parameter(torch.tensor(-math.log(init_temperature)))

    def parts(self, scores: Tensor, matched: Tensor) -> dict[str, Tensor]:
        return {"loss": _info_nce(self.log_scale.exp() * scores, matched),
                "temperature": (-self.log_scale).exp()}


def _cosines(images: Tensor, captions: Tensor) -> Tensor:
    images, captions = _wide(images, captions)
    with torch.autocast(images.device.type, enabled=False):
        return F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T


def _info_nce(logits: Tensor, matched: Tensor) -> Tensor:
    """Cross-entropy with the matches of a row as equal targets, mean over rows and directions."""
    target = matched.to(logits.dtype)
    return sum(F.cross_entropy(way, F.normalize(share, p=1, dim=1)) / 2
               for way, share in ((logits, target), (logits.T, target.T)))


# ---------------------------------------------------------------- similarities, larger = closer

SAMPLED = ("matching_prob", "log_matching_prob", "matmul")    # of samples (N, J, D)
POINTS = ("mean", "l2", "min", "max")                         # of mu (N, D)
GAUSSIANS = ("wasserstein", "elk", "bhattacharyya", "kl", "reverse_kl", "kl_official",
             "reverse_kl_official", "js", "csd", "match_prob_moment")   # of mu, logsigma (N, D)
METHODS = SAMPLED + POINTS + GAUSSIANS


def _csd(m1: Tensor, l1: Tensor, m2: Tensor, l2: Tensor) -> Tensor:
    return -(_squared(m1, m2) + (2 * l1).exp().sum(1, keepdim=True) + (2 * l2).exp().sum(1))


def _cross(m1: Tensor, v1: Tensor, m2: Tensor, v2: Tensor) -> Tensor:
    """sum ((m1 - m2)^2 + v1) / v2 for all pairs, as one matrix product."""
    left, right = torch.cat([m1.square() + v1, m1], 1), torch.cat([1 / v2, -2 * m2 / v2], 1)
    return left @ right.T + (m2.square() / v2).sum(1)


def _moment(m1: Tensor, l1: Tensor, m2: Tensor, l2: Tensor, shift: float, scale: float) -> Tensor:
    """E sigmoid(2 (b - a |delta|)), delta ~ N(m1 - m2, v), v = v1 + v2, without samples.

    |delta|^2 is taken for a scaled chi-square: its mean m = sum (d^2 + v) and its variance s2 =
    sum (2 v^2 + 4 d^2 v) are matrix products, and with k = 2 m^2 / s2 degrees of freedom it is a
    cubed Gaussian (Wilson-Hilferty), averaged here at 16 Gauss-Hermite nodes.
    """
    v1, v2, mean = (2 * l1).exp(), (2 * l2).exp(), -_csd(m1, l1, m2, l2)
    left = torch.cat([4 * m1.square(), -8 * m1 * v1, -8 * m1, 4 * v1], 1)
    variance = left @ torch.cat([v2, m2, m2 * v2, m2.square() + v2], 1).T
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


def _tile(method: str, q: Sequence[Tensor], g: Sequence[Tensor], ab: tuple[float, float]) -> Tensor:
    """(n, m) similarities of q and g, each [samples], [mu] or [mu, logsigma]; ab: shift, scale."""
    if method == "matmul":
        return q[0].sum(1) @ g[0].sum(1).T
    if method in SAMPLED:
        s = _logits(*q, *g, *ab)
        return _log_mean_sigmoid(s) if method.startswith("log") else s.sigmoid_().mean((1, 3))
    m1, m2 = q[0], g[0]
    if method == "mean":
        return m1 @ m2.T
    if method == "l2":
        return -_squared(m1, m2)
    if method in ("min", "max"):
        squares = (m1[:, None] - m2).square()
        return -(squares.amin(-1) if method == "min" else squares.amax(-1))
    l1, l2 = q[1], g[1]
    if method == "wasserstein":
        return -_squared(torch.cat([m1, l1.exp()], 1), torch.cat([m2, l2.exp()], 1))
    if method == "csd":
        return _csd(m1, l1, m2, l2)
    if method == "match_prob_moment":
        return _moment(m1, l1, m2, l2, *ab)
    if method.startswith("reverse_"):
        return _tile(method.removeprefix("reverse_"), g, q, ab).T
    v1, v2 = (2 * l1).exp(), (2 * l2).exp()
    if method in ("elk", "bhattacharyya"):
        squares, v = (m1[:, None] - m2).square(), v1[:, None] + v2
        if method == "elk":
            return -0.5 * (squares / v + v.log()).sum(-1)
        return -(squares / (4 * v) + 0.5 * ((v / 2).log() - l1[:, None] - l2)).sum(-1)
    cross, logs = _cross(m1, v1, m2, v2), l1.sum(1, keepdim=True) - l2.sum(1)
    if method == "js":
        return -cross - _cross(m2, v2, m1, v1).T
    if method == "kl":
        return logs - 0.5 * (cross - m1.shape[1])
    return -cross - 2 * logs              # kl_official: with that sign of the logs, no divergence


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
    `out` (Nq, Ng) is filled. Gradients are not kept.
    """
    _check_choice(METHODS, method=method)
    _check_finite(shift=shift, negative_scale=negative_scale)
    q, g = _tensor(q=q), _tensor(g=g)
    _check_items(3 if method in SAMPLED else 2, q=q, g=g)
    queries, gallery = [q], [g]
    if method in GAUSSIANS:
        _check_shape(*q.shape, q_logsigma=q_logsigma)
        _check_shape(*g.shape, g_logsigma=g_logsigma)
        queries, gallery = [q, torch.as_tensor(q_logsigma)], [g, torch.as_tensor(g_logsigma)]
    device, dtype = device or q.device, dtype or torch.promote_types(q.dtype, torch.float32)
    if not getattr(dtype, "is_floating_point", False):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    if out is None:
        out = torch.empty(len(q), len(g), dtype=dtype, device=device)
    _check_items(2, out=out)
    _check_shape(len(q), len(g), out=out)
    if block is None:                                         # tiles of a few MB
        elementwise = method in ("min", "max", "elk", "bhattacharyya")
        block = 32 if elementwise else max(1, 448 // q.shape[1]) if method in SAMPLED else 1024
    _check_count(block=block)
    wide = torch.promote_types(dtype, torch.float32)
    for row, column in itertools.product(range(0, len(q), block), range(0, len(g), 4 * block)):
        rows, columns = slice(row, row + block), slice(column, column + 4 * block)
        left, right = ([x[part].to(device, wide) for x in side]
                       for side, part in ((queries, rows), (gallery, columns)))
        with torch.autocast(left[0].device.type, enabled=False):
            tile = _tile(method, left, right, (float(shift), float(negative_scale)))
        out[rows, columns] = tile.to(out)
    return out


# ---------------------------------------------------------------- retrieval metrics

ROWS = 64                                 # queries ranked at once: bounds memory, fits the cache


def _similarity(sim) -> Tensor:
    sim = _tensor(sim=sim).detach()
    sim = _wide(sim)[0] if sim.is_floating_point() else sim.double()
    if sim.ndim != 2 or 0 in sim.shape:
        raise ValueError(f"sim must be non-empty (queries, gallery), got {(*sim.shape,)}")
    if not all(torch.isfinite(part).all() for part in sim.split(ROWS)):
        raise ValueError("sim holds NaN or infinite values; they cannot be ranked")
    return sim


def _judged(sim, positives) -> tuple[Tensor, Tensor]:
    sim = _similarity(sim)
    positives = _tensor(sim.device, *sim.shape, positives=positives)
    _check_binary(positives=positives)
    return sim, positives.bool()


def _labels(sim: Tensor, **rows_and_columns) -> list[Tensor]:
    """Two arrays as tensors, one with an entry per row of sim and one with an entry per column."""
    return [_tensor(sim.device, count, **{name: array})
            for (name, array), count in zip(rows_and_columns.items(), sim.shape)]


def _with_positives(counts: Tensor, ignore_empty: bool = False) -> Tensor:
    """Indices of the queries to evaluate: those with a positive in the gallery."""
    empty = (counts == 0).nonzero().flatten()
    if len(empty) and (not ignore_empty or len(empty) == len(counts)):
        raise ValueError(f"{len(empty)} queries have no positive in the gallery, "
                         f"first {empty[:5].tolist()}")
    return counts.nonzero().flatten()


def _best_ranks(sim: Tensor, positives: Tensor) -> np.ndarray:
    """0-based rank of the best positive of each query, by counting, without a sort."""
    _with_positives(positives.any(1))
    ranks, place = [], torch.arange(sim.shape[1], device=sim.device)
    for part, match in zip(sim.split(ROWS), positives.split(ROWS)):
        best = part.masked_fill(~match, -math.inf).amax(1, keepdim=True)
        tied = part == best
        first = (tied & match).to(torch.uint8).argmax(1, keepdim=True)
        ranks.append(((part > best) | (tied & (place < first))).sum(1))
    return torch.cat(ranks).cpu().numpy()


def _recalls(sim: Tensor, positives: Tensor, scale: float) -> dict[str, float]:
    ranks = _best_ranks(sim, positives)
    recalls = {f"recall_{k}": scale * float((ranks < k).mean()) for k in (1, 5, 10)}
    return {**recalls, "rsum": sum(recalls.values()), "medr": float(np.floor(np.median(ranks)) + 1),
            "meanr": float(ranks.mean() + 1)}


def _precisions(sim: Tensor, positives: Tensor, ignore_empty: bool = False,
                cuts: Sequence[int] = ()) -> list[float]:
    """R-Precision (R = number of a query's positives), mAP@R, precision@k of each cut: means."""
    counts, values = positives.sum(1), []
    for part in _with_positives(counts, ignore_empty).split(ROWS):
        ranking = sim[part].sort(dim=1, descending=True, stable=True).indices
        hits, r = positives[part].gather(1, ranking), counts[part]
        top, place = hits[:, :int(r.max())], torch.arange(1, int(r.max()) + 1, device=sim.device)
        top = (top & (place <= r[:, None])).double()
        average = (top.cumsum(1) / place * top).sum(1) / r
        values.append(torch.stack([top.sum(1) / r, average,
                                   *(hits[:, :k].double().sum(1) / k for k in cuts)]))
    return torch.cat(values, 1).mean(1).tolist()


def recall_at_k(sim, positives, k: int) -> float:
    """Fraction of queries with a positive among the k most similar; sim, positives (Nq, Ng).

    Equal similarities rank by gallery index, here and in all metrics.
    """
    _check_count(k=k)
    return float((_best_ranks(*_judged(sim, positives)) < k).mean())


def r_precision(sim, positives, ignore_empty: bool = False) -> float:
    """Mean fraction of positives among the first R, R = number of the query's positives."""
    return _precisions(*_judged(sim, positives), ignore_empty)[0]


def map_at_r(sim, positives, ignore_empty: bool = False) -> float:
    """mAP@R: mean over queries of (1 / R) sum_{r <= R} precision@r * relevant_r."""
    return _precisions(*_judged(sim, positives), ignore_empty)[1]


def eccv_metrics(sim, positives) -> dict[str, float]:
    """The metrics of ECCV Caption (arXiv:2204.03359) for one direction, fractions."""
    precision, average = _precisions(*_judged(sim, positives))
    return {"eccv_map_at_r": average, "eccv_rprecision": precision,
            "eccv_r1": recall_at_k(sim, positives, 1)}


def _folds(n: int, folds: int) -> list[slice]:
    _check_count(folds=folds)
    if n % folds:
        raise ValueError(f"folds must divide the number of images, {n}, got {folds}")
    return [slice(start, start + n // folds) for start in range(0, n, n // folds)]


def coco_recalls(sim, image_ids, caption_image_ids, folds: int | None = 5) -> dict[str, float]:
    """Recalls in PERCENT of sim (images, captions) in both directions.

    {i2t,t2i}_{recall_1,recall_5,recall_10,rsum,medr,meanr}; with folds also nfold_...: means over
    consecutive blocks of images, each with its own captions ("1K" is 5 folds of COCO's 5,000
    images).
    """
    sim = _similarity(sim)
    images, captions = _labels(sim, image_ids=image_ids, caption_image_ids=caption_image_ids)

    def both(sim: Tensor, own: Tensor) -> dict[str, float]:
        return {f"{way}_{name}": value for way, s, p in (("i2t", sim, own), ("t2i", sim.T, own.T))
                for name, value in _recalls(s, p, 100.0).items()}

    own = images[:, None] == captions
    result, parts = both(sim, own), []
    for rows in _folds(len(sim), folds) if folds is not None else ():
        columns = own[rows].any(0)
        parts.append(both(sim[rows][:, columns], own[rows][:, columns]))
    return result | {f"nfold_{name}": float(np.mean([part[name] for part in parts]))
                     for name in (result if parts else ())}


def cub_metrics(sim, q_labels, g_labels, percent: bool = False) -> dict[str, float]:
    """One direction where all gallery items of the query's class are positives, as fractions.

    recall_{1,5,10}, rsum, precision_{5,10,50,100} (divided by k even when the gallery is shorter),
    r_precision, map_r, medr, meanr; percent=True scales all but the last two.
    """
    sim = _similarity(sim)
    q, g = _labels(sim, q_labels=q_labels, g_labels=g_labels)
    scale, own, cuts = 100.0 if percent else 1.0, q[:, None] == g, (5, 10, 50, 100)
    names = ("r_precision", "map_r", *(f"precision_{k}" for k in cuts))
    precisions = _precisions(sim, own, cuts=cuts)
    return _recalls(sim, own, scale) | {n: scale * value for n, value in zip(names, precisions)}


def plausible_match_codes(instances: dict | list,
                          image_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """COCO instance annotations -> codes (Ni, 90) uint8, bit category_id - 1; annotated (Ni,) bool.

    instances: the JSON dict or its "annotations"; an image without any instance is not annotated.
    """
    items = instances.get("annotations") if isinstance(instances, dict) else instances
    if items is None:
        raise ValueError(f"instances must have 'annotations', got {list(instances)}")
    image_ids = [int(image) for image in image_ids]
    held = {image: np.zeros(90, dtype=np.uint8) for image in image_ids}
    for item in items:
        code, category = held.get(item["image_id"]), item.get("category_id")
        if code is not None:
            if category not in range(1, 91):
                raise ValueError(f"category_id must be in 1..90, got {category!r}")
            code[category - 1] = 1
    codes = np.stack([held[image] for image in image_ids])
    return codes, codes.any(1)


def pmrp(sim, codes, caption_image_index, zetas: Sequence[int] = (0, 1, 2),
         folds: int | None = None, drop_last: bool = False,
         annotated=None) -> dict[str, float | np.ndarray]:
    """Plausible-Match R-Precision (section 4.1): items whose codes differ in <= zeta bits match.

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
    keep, owner = _labels(sim, annotated=annotated, caption_image_index=caption_image_index)
    codes = _tensor(sim.device, codes=codes).float()
    if codes.ndim != 2 or len(codes) != count:
        raise ValueError(f"codes must be ({count}, K), got {(*codes.shape,)}")
    _check_binary(codes=codes, annotated=keep)
    _check_indices(0, count - 1, caption_image_index=owner)
    owner = owner.long()                                      # uint8 would be a mask
    if not len(zetas) or any(zeta < 0 or zeta != int(zeta) for zeta in zetas):
        raise ValueError(f"zetas must be integers >= 0, got {zetas!r}")
    parts = []
    for rows in _folds(count, 1 if folds is None else folds):
        inside = torch.zeros(count, dtype=torch.bool, device=sim.device)
        inside[rows] = keep[rows].bool()
        images, captions = inside.nonzero().flatten(), inside[owner].nonzero().flatten()
        if not len(captions):
            raise ValueError(f"annotated leaves no caption of images {rows.start}..{rows.stop - 1}")
        image_codes, caption_codes, part = codes[images], codes[owner[captions]], {}
        for way, scores, queries, gallery, q_codes, g_codes in (
                ("i2t", sim, images, captions, image_codes, caption_codes),
                ("t2i", sim.T, captions, images, caption_codes, image_codes)):
            # filled in place: small results kept between large buffers would pin the heap
            values = torch.empty(2, len(zetas), len(queries), dtype=torch.float64)
            for query, code, into in zip(queries.split(ROWS), q_codes.split(ROWS),
                                         values.split(ROWS, dim=2)):
                into[:] = _plausible_precision(scores, query, gallery, code, g_codes, zetas,
                                               drop_last)
            part[f"{way}_rprecision"], part[f"{way}_r1"] = values.numpy()
        parts.append(part)
    result = {f"{way}_{short}": 100 * float(np.mean([p[f"{way}_{name}"].mean() for p in parts]))
              for way in ("i2t", "t2i") for short, name in (("pmrp", "rprecision"), ("pmr1", "r1"))}
    return result if folds is not None else result | parts[0]


def _plausible_precision(sim: Tensor, queries: Tensor, gallery: Tensor, q_codes: Tensor,
                         g_codes: Tensor, zetas: Sequence[int], drop_last: bool) -> Tensor:
    """R-Precision and R@1 (2, zetas, n) of n rows of sim that rank its `gallery` columns.

    No ranking is formed: the R-th largest score of a row tells which items are among its first R.
    """
    scores = sim[queries]
    hamming = q_codes @ (1 - g_codes).T + (1 - q_codes) @ g_codes.T
    if drop_last:                                            # the last of a stable descending order
        last = scores.shape[1] - 1 - scores.flip(1).argmin(1)
        hamming = hamming.masked_fill(gallery == last[:, None], math.inf)
    scores = scores[:, gallery]
    top = scores.argmax(1, keepdim=True)                      # the first of equal ones
    # numpy sorts values on the CPU several times faster than torch
    ordered = (scores.sort(1).values if scores.device.type != "cpu"
               else torch.from_numpy(np.sort(scores.numpy(), axis=1)))
    precision, first = [], []
    for plausible in (hamming <= zeta for zeta in zetas):
        r = plausible.sum(1, keepdim=True)
        if not r.all():                                       # the own pair was last, and dropped
            raise ValueError("drop_last leaves queries without a plausible item, first "
                             f"{queries[r.flatten() == 0][:5].tolist()}")
        cut = ordered.gather(1, scores.shape[1] - r)
        among = scores >= cut
        if (among.sum(1, keepdim=True) > r).any():            # of equal scores, the first ones
            tied = scores == cut
            among &= ~tied | (tied.cumsum(1) <= r - (scores > cut).sum(1, keepdim=True))
        precision.append((plausible & among).sum(1) / r.flatten().double())
        first.append(plausible.gather(1, top).flatten().double())
    return torch.stack([torch.stack(precision), torch.stack(first)])


# ---------------------------------------------------------------- uncertainty

def uncertainty(logsigma, kind: str = "geometric_mean") -> Tensor:
    """logsigma (N, D) -> (N,): "geometric_mean" mean_k logsigma, or "trace" sum_k sigma^2."""
    logsigma = _tensor(logsigma=logsigma)
    _check_items(2, logsigma=logsigma)
    _check_choice(("geometric_mean", "trace"), kind=kind)
    logsigma, = _wide(logsigma)
    return logsigma.mean(1) if kind == "geometric_mean" else (2 * logsigma).exp().sum(1)


def uncertainty_bins(u, metric, n_bins: int = 10) -> dict[str, np.ndarray | float]:
    """Means of u and metric (N,) in n_bins bins of rising u, floor(N / n_bins) items each.

    metric, uncertainty (n_bins,); correlation: Pearson of bin index and metric, strongly negative
    for an uncertainty that predicts failure. The items that are left over take no part.
    """
    u, metric = (np.asarray(x.detach().double().cpu() if isinstance(x, Tensor) else x, np.float64)
                 for x in (u, metric))
    if u.ndim != 1 or u.shape != metric.shape or not 2 <= n_bins <= len(u):
        raise ValueError(f"u and metric must be equal (N,) with N >= n_bins >= 2, got {u.shape}, "
                         f"{metric.shape}, {n_bins}")
    if not np.isfinite([u, metric]).all():
        raise ValueError("u and metric must be finite")
    order = np.argsort(u, kind="stable")[:len(u) // n_bins * n_bins].reshape(n_bins, -1)
    bins = metric[order].mean(1)
    correlation = np.corrcoef(np.arange(n_bins), bins)[0, 1] if bins.std() > 0 else 0.0
    return {"metric": bins, "uncertainty": u[order].mean(1), "correlation": float(correlation)}


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
    kept = lengths - gone.sum(1)
    order = absent.sort(dim=1, stable=True).indices
    return tokens.gather(1, order).masked_fill(position >= kept.unsqueeze(1), 0), kept


def occlusion_curve(model: PCME, images: Tensor, ratios: Sequence[float],
                    seed: int = 0) -> dict[float, float]:
    """Ratio -> mean uncertainty of images with that part of the area hidden (`occlude`)."""
    return _curve(model, ratios, model.encode_image, lambda ratio: (occlude(images, ratio, seed),))


def word_drop_curve(model: PCME, tokens: Tensor, lengths: Tensor, ratios: Sequence[float],
                    seed: int = 0) -> dict[float, float]:
    """Ratio -> mean uncertainty of captions without that part of their words (`drop_words`)."""
    return _curve(model, ratios, model.encode_text,
                  lambda ratio: drop_words(tokens, lengths, ratio, seed))


@torch.no_grad()
def _curve(model: PCME, ratios: Sequence[float], encode: Callable,
           damaged: Callable) -> dict[float, float]:
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ValueError(f"ratios must be in [0, 1], got {list(ratios)}")
    training = [module for module in model.modules() if module.training]
    model.eval()                                              # batch norm's statistics stay
    try:
        return {ratio: uncertainty(encode(*damaged(ratio), num_samples=0)["logsigma"]).mean().item()
                for ratio in ratios}
    finally:
        for module in training:
            module.training = True


# ---------------------------------------------------------------- tokens

# A caption is read once, from left to right; whatever is no break belongs to a word.
_BREAKS = r"""`{1,2} | \.{2,} | -- | [«“‘„»”’] | [][(){}<>;@\#$%&?!*\u2012-\u2015]
    | [:,] (?!\d)                                             # 10:30 and 1,000 stay whole
    | \. (?= (?: [])}>'»”’\s] | (?<!\s)" )* $ )              # the period that ends the caption
    | (?<!\w) ' (?! (?:re|ve|ll|[mtsdn])\b ) (?=\w """        # an apostrophe that opens a quotation
_QUOTES = r"""(?P<opening> (?<![^ (\[{<`«“‘„]) " | (?<=[ (\[{<`«“‘„]) ''
        | (?<=\A") (?: " | '' ) )
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

    In a process group all ranks start as rank 0 does and their samples are gathered, so that the
    loss and its gradient are those of the whole batch (ranks need equal batches): what
    DistributedDataParallel does, if it is around the model, is left out. Send "state" for a
    snapshot; `resume` takes it and goes on to the same numbers.
    """
    counts = [epochs] * len(phases) if isinstance(epochs, (int, np.integer)) else list(epochs)
    if len(counts) != len(phases) or not counts:
        raise ValueError(f"epochs must be one per phase ({len(phases)}), got {epochs}")
    for count, phase in zip(counts, phases):
        if not isinstance(phase, dict) or not {"lr"} <= phase.keys() <= {"lr", "t_max", "frozen"}:
            raise ValueError(f"a phase must be a dict of lr, t_max and frozen, got {phase}")
        _check_count(epochs=count, t_max=phase.get("t_max", 1))
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0 or None, got {clip}")
    model = getattr(model, "module", model)                   # inside DistributedDataParallel
    device, own = next(model.parameters()).device, list(criterion.parameters())
    generator = torch.Generator(device).manual_seed(seed)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    plan = [(phase, epoch) for phase, count in enumerate(counts) for epoch in range(count)]
    position = {"phase": 0, "epoch": 0, "batch": 0, "step": 0}
    if resume:
        model.load_state_dict(resume["model"])
        criterion.load_state_dict(resume["criterion"])
        generator.set_state(resume["generator"])
        position = resume["position"]
    if dist.is_initialized():
        for value in (*model.state_dict().values(), *criterion.state_dict().values()):
            dist.broadcast(value, 0)
    first, step = plan.index((position["phase"], position["epoch"])), position["step"]
    try:
        for number, (phase, epoch) in enumerate(plan[first:], first):
            settings, skip = phases[phase], position["batch"] if number == first else 0
            if epoch == 0 or number == first:
                frozen = settings.get("frozen", ())
                frozen = frozen if isinstance(frozen, str) else tuple(frozen)
                for name, parameter in model.named_parameters():
                    plain = name.replace("_orig_mod.", "")    # of compiled modules
                    parameter.requires_grad_(trainable[name] and not plain.startswith(frozen))
                weights = [p for p in model.parameters() if p.requires_grad]
                updates = optimizer(weights + own, lr=settings["lr"])
            if resume and number == first:
                updates.load_state_dict(copy.deepcopy(resume["optimizer"]))   # it would keep it
                scaler.load_state_dict(resume["scaler"])
            turn = math.pi * epoch / settings.get("t_max", counts[phase])
            lr = settings["lr"] * 0.5 * (1 + math.cos(turn))
            for group in updates.param_groups:
                group["lr"] = lr
            batches, order, began = _epoch(loader, number, skip, resume["order"] if skip else None)
            index = skip - 1
            for index, batch in batches:
                model.train()                                 # the caller may evaluate in between
                for module in model.modules():
                    if freeze_bn and isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.eval()
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
                floats = torch.stack([value.float() for value in values.values()]).tolist()
                row = {"step": step, "phase": phase, "epoch": epoch, "lr": lr}
                request = yield row | dict(zip(values, floats))
                while request == "state":
                    position = {"phase": phase, "epoch": epoch, "batch": index + 1, "step": step}
                    request = yield copy.deepcopy({
                        "model": model.state_dict(), "criterion": criterion.state_dict(),
                        "optimizer": updates.state_dict(), "scaler": scaler.state_dict(),
                        "generator": generator.get_state(), "position": position,
                        "order": [began, order.get_state()]})
            if index < 0:
                raise ValueError(f"loader gave no batch in epoch {epoch} of phase {phase}; "
                                 "an iterator serves one epoch only")
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])


def _epoch(loader: Iterable, epoch: int, skip: int, states: list[Tensor] | None) -> tuple:
    """The numbered batches of an epoch from `skip` on, what a DataLoader shuffles with, and its
    state as the epoch began; `states`, of a resumed epoch: that one and the one to go on with."""
    order = getattr(loader, "generator", None) or torch.default_generator
    if states:
        if epoch and getattr(loader, "persistent_workers", False):
            iter(loader)                                      # draws once, in the first epoch
        order.set_state(states[0])
    began = order.get_state()
    if seeks := hasattr(loader, "set_epoch"):
        loader.set_epoch(epoch, skip)
    batches = enumerate(loader, skip if seeks else 0)
    if states:
        for _ in zip(range(0 if seeks else skip), batches):   # done before
            pass
        order.set_state(states[1])
    return batches, order, began


def _batch_loss(model: PCME, criterion: nn.Module, out: dict, ids: list[Tensor],
                generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """The criterion over the samples of all ranks."""
    j = getattr(model.img_enc, "n_samples_inference", 7)
    mus, logsigmas = ([_gathered(x) for x in _wide(out[f"image_{name}"], out[f"caption_{name}"])]
                      for name in ("mu", "logsigma"))
    samples = [sample_gaussian(mu, logsigma, j, generator) if j else mu.unsqueeze(1)
               for mu, logsigma in zip(mus, logsigmas)]
    matched = _gathered(ids[0])[:, None] == _gathered(ids[-1]) if ids else None
    return criterion(*samples, *logsigmas, matched, generator=generator,
                     image_mu=mus[0], caption_mu=mus[1])


def _gathered(x: Tensor) -> Tensor:
    """Rows of all ranks in rank order; only the own ones carry a gradient."""
    if not dist.is_initialized():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[dist.get_rank()] = x
    return torch.cat(parts)


def _reduce_gradients(weights: list[Tensor], own: list[Tensor]) -> None:
    """Sum the weights' gradients over the ranks (of their own rows); average the criterion's."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    for parameters, share in ((weights, 1), (own, ranks)) if ranks > 1 else ():
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= share


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
