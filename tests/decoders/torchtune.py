"""In the style of torchtune: a block of interchangeable modules, a RoPE cache that is gathered, heads by expand."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.scale = (dim,), eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), normalized_shape=self.normalized_shape, weight=self.scale, eps=self.eps).to(
            x.dtype
        )


class RotaryPositionalEmbeddings(nn.Module):
    def __init__(self, dim: int, max_seq_len: int, base: int = 10_000) -> None:
        super().__init__()
        theta = 1.0 / (base ** (torch.arange(0, dim, 2)[: dim // 2].float() / dim))
        angles = torch.einsum("i, j -> ij", torch.arange(max_seq_len, dtype=theta.dtype), theta)
        self.register_buffer("cache", torch.stack([torch.cos(angles), torch.sin(angles)], dim=-1), persistent=False)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        rope_cache = self.cache[: x.size(1)] if input_pos is None else self.cache[input_pos]
        xshaped = x.float().reshape(*x.shape[:-1], -1, 2)
        rope_cache = rope_cache.view(-1, xshaped.size(1), 1, xshaped.size(3), 2)
        x_out = torch.stack(
            [
                xshaped[..., 0] * rope_cache[..., 0] - xshaped[..., 1] * rope_cache[..., 1],
                xshaped[..., 1] * rope_cache[..., 0] + xshaped[..., 0] * rope_cache[..., 1],
            ],
            -1,
        )
        return x_out.flatten(3).type_as(x)


class KVCache(nn.Module):
    def __init__(self, batch: int, max_seq_len: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (batch, heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("cache_pos", torch.arange(0, max_seq_len), persistent=False)

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        seq_len = k_val.size(2)
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, self.cache_pos[:seq_len]] = k_val
        v_out[:, :, self.cache_pos[:seq_len]] = v_val
        self.cache_pos.add_(seq_len)
        return k_out, v_out


class MultiHeadAttention(nn.Module):
    def __init__(self, dim: int, heads: int, kv_heads: int, pos_embeddings: nn.Module) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.output_proj = nn.Linear(dim, dim, bias=False)
        self.pos_embeddings = pos_embeddings
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, y: Tensor, *, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        b, s_x, _ = x.shape
        s_y = y.shape[1]
        q = self.q_proj(x).view(b, s_x, self.num_heads, self.head_dim)
        q = self.pos_embeddings(q, input_pos=input_pos).transpose(1, 2)
        k, v = self.k_proj(y), self.v_proj(y)
        k = k.view(b, s_y, self.num_kv_heads, self.head_dim)
        k = self.pos_embeddings(k, input_pos=input_pos).transpose(1, 2)
        v = v.view(b, s_y, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if self.kv_cache is not None:
            k, v = self.kv_cache.update(k, v)
        expand_shape = (b, self.num_kv_heads, self.num_heads // self.num_kv_heads, -1, self.head_dim)
        k = k.unsqueeze(2).expand(expand_shape).flatten(1, 2)
        v = v.unsqueeze(2).expand(expand_shape).flatten(1, 2)
        if mask is not None:
            mask = mask[:, None, :, :]
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.output_proj(output.transpose(1, 2).contiguous().view(b, s_x, -1))


class FeedForward(nn.Module):
    def __init__(self, *, gate_proj: nn.Module, down_proj: nn.Module, up_proj: nn.Module) -> None:
        super().__init__()
        self.w1, self.w2, self.w3, self.activation = gate_proj, down_proj, up_proj, nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.w1(x))
        h = h * self.w3(x)
        return self.w2(h)


class TransformerSelfAttentionLayer(nn.Module):
    def __init__(self, attn: nn.Module, mlp: nn.Module, sa_norm: nn.Module, mlp_norm: nn.Module) -> None:
        super().__init__()
        self.attn, self.mlp, self.sa_norm, self.mlp_norm = attn, mlp, sa_norm, mlp_norm
        self.sa_scale, self.mlp_scale = nn.Identity(), nn.Identity()

    def forward(self, x: Tensor, *, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        h = self.sa_norm(x)
        h = self.sa_scale(self.attn(h, h, mask=mask, input_pos=input_pos)) + x
        return h + self.mlp_scale(self.mlp(self.mlp_norm(h)))


class TransformerDecoder(nn.Module):
    def __init__(self, vocabulary: int = 256, dim: int = 64, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.num_kv_heads, self.head_dim = kv_heads, dim // heads
        rope = RotaryPositionalEmbeddings(dim // heads, 32)
        self.tok_embeddings = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(
            TransformerSelfAttentionLayer(
                attn=MultiHeadAttention(dim, heads, kv_heads, rope),
                mlp=FeedForward(
                    gate_proj=nn.Linear(dim, 176, bias=False),
                    down_proj=nn.Linear(176, dim, bias=False),
                    up_proj=nn.Linear(dim, 176, bias=False),
                ),
                sa_norm=RMSNorm(dim),
                mlp_norm=RMSNorm(dim),
            )
            for _ in range(2)
        )
        self.norm, self.output = RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def setup_caches(self, batch_size: int, max_seq_len: int) -> None:
        for layer in self.layers:
            dtype = layer.attn.k_proj.weight.dtype
            layer.attn.kv_cache = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None) -> Tensor:
        h = self.tok_embeddings(tokens)
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.output(self.norm(h)).float()
