"""In the style of x-transformers: norms by F.normalize, attention by einsum, ALiBi, GLU feed-forward, scaled residuals.

Layers are a flat list of (norm, block, residual); keys and values of earlier tokens come in as an argument.
"""

import math

import torch
from torch import Tensor, einsum, nn
from torch.nn import functional as F


class ScaleNorm(nn.Module):
    """One number for all channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * self.g


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) * self.scale * (self.g + 1)


class AlibiPositionalBias(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        slopes = torch.tensor([2 ** (-8 * (head + 1) / heads) for head in range(heads)]).view(heads, 1, 1)
        self.register_buffer("slopes", slopes, persistent=False)

    def forward(self, i: int, j: int, device: torch.device) -> Tensor:
        seq_i, seq_j = torch.arange(j - i, j, device=device), torch.arange(j, device=device)
        return -(seq_j[None, None, :] - seq_i[None, :, None]).abs() * self.slopes


class RelativePositionBias(nn.Module):
    """One learned number a head for every distance, far ones in buckets of growing size."""

    def __init__(self, heads: int, num_buckets: int = 8, max_distance: int = 16) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def bucket(self, distance: Tensor) -> Tensor:
        n, exact = torch.clamp(distance, min=0), self.num_buckets // 2
        far = torch.log(n.float().clamp(min=1) / exact) / math.log(self.max_distance / exact)
        far = exact + (far * (self.num_buckets - exact)).long()
        return torch.where(n < exact, n, torch.clamp(far, max=self.num_buckets - 1))

    def forward(self, i: int, j: int, device: torch.device) -> Tensor:
        seq_i, seq_j = torch.arange(j - i, j, device=device), torch.arange(j, device=device)
        values = self.relative_attention_bias(self.bucket(seq_i[:, None] - seq_j[None, :]))
        return values.permute(2, 0, 1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, rel_pos: nn.Module) -> None:
        super().__init__()
        self.heads, self.scale, self.rel_pos = heads, (dim // heads) ** -0.5, [rel_pos]
        self.to_q, self.to_k = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.to_v, self.to_out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, n, _ = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        if past is not None:
            k, v = torch.cat((past[0], k), dim=-2), torch.cat((past[1], v), dim=-2)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        i, j = dots.shape[-2:]
        dots = dots + self.rel_pos[0](i, j, x.device)
        causal = torch.ones((i, j), dtype=torch.bool, device=x.device).triu(j - i + 1)
        dots = dots.masked_fill(causal, -torch.finfo(dots.dtype).max)
        attn = F.softmax(dots, dim=-1, dtype=torch.float32).type(dots.dtype)
        out = einsum("b h i j, b h j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1)), (k, v)


class GLU(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.act, self.proj = nn.GELU(), nn.Linear(dim_in, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * self.act(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(GLU(dim, inner), nn.Dropout(0.1), nn.Linear(inner, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class Residual(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale_residual_constant = scale

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return x + residual * self.scale_residual_constant


class AttentionLayers(nn.Module):
    def __init__(self, dim: int, heads: int, depth: int, norm: type[nn.Module], rel_pos: nn.Module) -> None:
        super().__init__()
        self.rel_pos = rel_pos
        self.layers = nn.ModuleList()
        for _ in range(depth):
            for block in Attention(dim, heads, rel_pos), FeedForward(dim, 176):
                self.layers.append(nn.ModuleList([norm(dim), block, Residual(0.8)]))
        self.final_norm = norm(dim)

    def forward(self, x: Tensor, cache: list | None) -> tuple[Tensor, list]:
        past, present = list(cache or []), []
        for norm, block, residual in self.layers:
            if isinstance(block, Attention):
                out, keys_values = block(norm(x), past.pop(0) if past else None)
                present.append(keys_values)
            else:
                out = block(norm(x))
            x = residual(out, x)
        return self.final_norm(x), present


class TransformerWrapper(nn.Module):
    def __init__(
        self,
        vocabulary: int = 256,
        dim: int = 64,
        heads: int = 4,
        norm: type[nn.Module] = RMSNorm,
        rel_pos: type[nn.Module] = AlibiPositionalBias,
    ) -> None:
        super().__init__()
        self.token_emb, self.emb_dropout = nn.Embedding(vocabulary, dim), nn.Dropout(0.1)
        self.attn_layers = AttentionLayers(dim, heads, 2, norm, rel_pos(heads))
        self.to_logits = nn.Linear(dim, vocabulary, bias=False)

    def forward(self, x: Tensor, cache: list | None = None) -> tuple[Tensor, list]:
        x, present = self.attn_layers(self.emb_dropout(self.token_emb(x)), cache)
        return self.to_logits(x), present
