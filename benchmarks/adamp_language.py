"""AdamW and AdamP on a small language model, with and without weight normalisation.

    python benchmarks/adamp_language.py                        # 3 seeds, about 2 minutes

Text: 4,000 lines of 33 symbols out of 16, each drawn by a fixed random law of the two before it, so
that the least possible perplexity is known. Model: a Transformer of two layers, width 48, trained
for 6 epochs; with weight normalisation (w = g v / |v|, row by row) all matrices of its layers are
scale invariant. Paper, WikiText-103, Transformer-XL (perplexity): AdamW 23.38, AdamP 23.26; with
weight normalisation 23.96 and 22.77. The claim: AdamP gains little on the plain network, where few
weights are scale invariant, and more on the normalised one, where AdamW makes the weights grow.
"""

import math
import statistics

import harness
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from adamp_imagenet import decided
from reference import adamp

SYMBOLS, WIDTH, CONTEXT, LAYERS = 16, 48, 32, 2
OPTIMIZERS = {"adamw": torch.optim.AdamW, "adamp": adamp.AdamP}
PAPER = {"adamw": 23.38, "adamp": 23.26, "adamw-normalised": 23.96, "adamp-normalised": 22.77}


def text(count, seed):
    """(count, CONTEXT + 1) symbols, and the perplexity of the law that drew them."""
    generator, law_generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    law = (3 * torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=law_generator)).softmax(-1)
    columns = list(torch.randint(SYMBOLS, (2, count), generator=generator))
    for _ in range(CONTEXT - 1):
        chances = law[columns[-2], columns[-1]]
        columns.append(torch.multinomial(chances, 1, generator=generator).squeeze(1))
    x = torch.stack(columns, 1)
    return x, math.exp(-law[x[:, :-2], x[:, 1:-1], x[:, 2:]].log().mean())


class LanguageModel(nn.Module):
    """A causal Transformer: symbols (B, CONTEXT) to logits (B, SYMBOLS, CONTEXT) of the next."""

    def __init__(self, seed, normalised):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.places = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True,
                                       norm_first=True) for _ in range(LAYERS))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS))
        self.register_buffer("mask", torch.ones(CONTEXT, CONTEXT, dtype=torch.bool).triu(1))
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=p.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for layer in self.layers if normalised else ():
            weight_norm(layer.self_attn, "in_proj_weight")
            for linear in (layer.self_attn.out_proj, layer.linear1, layer.linear2):
                weight_norm(linear)

    def forward(self, x):
        h = self.embedding(x) + self.places
        for layer in self.layers:
            h = layer(h, src_mask=self.mask)
        return self.head(h).transpose(1, 2)


@torch.no_grad()
def perplexity(model, x):
    """Of all symbols but the first two, which the law does not draw."""
    logits = model.eval()(x[:, :-1])[:, :, 1:]
    return math.exp(F.cross_entropy(logits, x[:, 2:]))


def norm(model):
    """Mean norm of the matrices of the layers (of v, where w = g v / |v|)."""
    return statistics.mean(p.norm().item() for p in model.layers.parameters()
                           if p.ndim > 1 and p.shape[1] > 1)


def main(argv=None):
    run = harness.start(harness.parser(__doc__, seeds=3, data=False, networks=False,
                                       figures=False), argv)
    tiny = run.args.preset == "tiny"
    train, (val, floor) = text(128 if tiny else 4000, 1)[0].to(run.device), text(500, 2)
    batches = [(b[:, :-1], b[:, 1:]) for b in train.split(64) if len(b) == 64]
    epochs, results = 1 if tiny else 6, {name: [] for name in PAPER}
    for seed in run.seeds:
        for method in results:
            name = f"{method}-seed{seed}"
            if (row := run.recorded(name)) is None:
                model = LanguageModel(seed, "normalised" in method).to(run.device)
                optimizer = OPTIMIZERS[method.split("-")[0]](model.parameters(), 1e-2,
                                                             weight_decay=1e-2)
                start, steps = norm(model), adamp.train(model, batches, optimizer, epochs,
                                                        resume=run.resumed(name))
                run.drive(name, steps, total=epochs * len(batches))
                stats = getattr(optimizer, "stats", None)
                row = run.record(name, {
                    "perplexity": perplexity(model, val.to(run.device)),
                    "norm start": start, "norm end": norm(model),
                    "projected": stats["projected"] / stats["tested"] if stats else None})
            results[method].append(row)
    table, judged = [], not tiny
    for method, rows in results.items():
        values = {key: [row[key] for row in rows] for key in rows[0]}
        table.append({"optimiser": method.removesuffix("-normalised"),
                      "weight normalisation": "yes" if "normalised" in method else "no",
                      "paper": PAPER[method], "perplexity": statistics.mean(values["perplexity"]),
                      "+-": statistics.stdev(values["perplexity"]) if len(rows) > 1 else 0.0}
                     | {key: statistics.mean(values[key]) if values[key][0] is not None else None
                        for key in ("norm start", "norm end", "projected")})
    gains = {suffix: [a["perplexity"] - b["perplexity"] for a, b in
                      zip(results["adamw" + suffix], results["adamp" + suffix])]
             for suffix in ("", "-normalised")}
    more = [b - a for a, b in zip(*gains.values())]
    claims = [{"claim": text, "paper": paper, "this run": statistics.mean(values),
               "holds": decided(values) if judged else None}
              for text, paper, values in (
                  ("perplexity gain of AdamP over AdamW, plain", 0.12, gains[""]),
                  ("the same with weight normalisation", 1.19, gains["-normalised"]),
                  ("the second gain over the first", 1.07, more))]
    run.log(f"least possible perplexity {floor:.3f}")
    run.finish(rows=claims, tables={"main": table})


if __name__ == "__main__":
    main()
