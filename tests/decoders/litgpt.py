"""In the style of LitGPT: q, k and v packed group by group, partial rotary, parallel residual, index_copy caches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float = 1e-6, add_unit_offset: bool = False) -> None:
        super().__init__()
        self.weight, self.eps, self.add_unit_offset = nn.Parameter(torch.ones(size)), eps, add_unit_offset

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.float()
        norm_x = torch.mean(x * x, dim=-1, keepdim=True)
        x_normed = x * torch.rsqrt(norm_x + self.eps)
        weight = (1 + self.weight) if self.add_unit_offset else self.weight
        return (x_normed * weight.float()).to(dtype=dtype)


def build_rope_cache(seq_len: int, n_elem: int, base: int = 10000) -> tuple[Tensor, Tensor]:
    theta = 1.0 / (base ** (torch.arange(0, n_elem, 2).float() / n_elem))
    idx_theta = torch.outer(torch.arange(seq_len), theta).repeat(1, 2)
    return torch.cos(idx_theta), torch.sin(idx_theta)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.size(-1) // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (rotated * sin)).to(dtype=x.dtype)


class KVCache(nn.Module):
    def __init__(self, k_shape: tuple[int, ...], v_shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k", torch.zeros(k_shape, dtype=dtype), persistent=False)
        self.register_buffer("v", torch.zeros(v_shape, dtype=dtype), persistent=False)

    def forward(self, input_pos: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.k.index_copy_(2, input_pos, k), self.v.index_copy_(2, input_pos, v)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, n_query_groups: int, rope_n_elem: int) -> None:
        super().__init__()
        self.n_head, self.n_query_groups, self.head_size = n_head, n_query_groups, n_embd // n_head
        self.rope_n_elem = rope_n_elem
        self.attn = nn.Linear(n_embd, (n_head + 2 * n_query_groups) * self.head_size, bias=True)
        self.proj = nn.Linear(n_head * self.head_size, n_embd, bias=True)
        self.kv_cache: KVCache | None = None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        B, T, _ = x.size()  # noqa: N806
        q_per_kv = self.n_head // self.n_query_groups
        qkv = self.attn(x).view(B, T, self.n_query_groups, q_per_kv + 2, self.head_size).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((q_per_kv, 1, 1), dim=2)
        if self.n_query_groups != self.n_head and (input_pos is None or self.n_query_groups != 1):
            k = k.expand(B, self.n_query_groups, q_per_kv, T, self.head_size)
            v = v.expand(B, self.n_query_groups, q_per_kv, T, self.head_size)
        q = q.reshape(B, -1, T, self.head_size)
        k = k.reshape(B, -1, T, self.head_size)
        v = v.reshape(B, -1, T, self.head_size)
        q_roped = apply_rope(q[..., : self.rope_n_elem], cos, sin)
        k_roped = apply_rope(k[..., : self.rope_n_elem], cos, sin)
        q = torch.cat((q_roped, q[..., self.rope_n_elem :]), dim=-1)
        k = torch.cat((k_roped, k[..., self.rope_n_elem :]), dim=-1)
        if input_pos is not None:
            k, v = self.kv_cache(input_pos, k, v)
        scale = self.head_size**-0.5
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0, scale=scale, is_causal=mask is None)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.head_size * self.n_head))


class GptNeoxMLP(nn.Module):
    def __init__(self, n_embd: int, intermediate_size: int) -> None:
        super().__init__()
        self.fc, self.proj = nn.Linear(n_embd, intermediate_size), nn.Linear(intermediate_size, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, norm: type[nn.Module], parallel_residual: bool) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norm(n_embd), norm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head, n_head // 2, rope_n_elem=n_embd // n_head // 2)
        self.mlp, self.parallel_residual = GptNeoxMLP(n_embd, 176), parallel_residual

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, input_pos: Tensor | None) -> Tensor:
        h = self.attn(self.norm_1(x), cos, sin, mask, input_pos)
        if self.parallel_residual:
            return self.mlp(self.norm_2(x)) + h + x
        x = h + x
        return self.mlp(self.norm_2(x)) + x


class GPT(nn.Module):
    def __init__(
        self,
        vocabulary: int = 256,
        n_embd: int = 64,
        n_head: int = 4,
        norm: type[nn.Module] = nn.LayerNorm,
        parallel_residual: bool = True,
    ) -> None:
        super().__init__()
        self.max_seq_length, self.n_head, self.head_size = 32, n_head, n_embd // n_head
        self.lm_head = nn.Linear(n_embd, vocabulary, bias=False)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocabulary, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head, norm, parallel_residual) for _ in range(2)),
                "ln_f": norm(n_embd),
            }
        )
        cos, sin = build_rope_cache(self.max_seq_length, self.head_size // 2)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.mask_cache: Tensor | None = None

    def set_kv_cache(self, batch_size: int) -> None:
        shape = (batch_size, self.n_head, self.max_seq_length, self.head_size)
        for block in self.transformer.h:
            block.attn.kv_cache = KVCache(shape, shape, self.lm_head.weight.dtype)
        ones = torch.ones((self.max_seq_length, self.max_seq_length), dtype=torch.bool)
        self.mask_cache = torch.tril(ones).unsqueeze(0).unsqueeze(0)

    def forward(self, idx: Tensor, input_pos: Tensor | None = None) -> Tensor:
        T = idx.size(1)  # noqa: N806
        if input_pos is not None:
            cos, sin = self.cos.index_select(0, input_pos), self.sin.index_select(0, input_pos)
            mask = self.mask_cache.index_select(2, input_pos)
        else:
            cos, sin, mask = self.cos[:T], self.sin[:T], None
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x, cos, sin, mask, input_pos)
        return self.lm_head(self.transformer.ln_f(x))
