"""Infini-attention's equations as loops over segments, tokens and heads, in float64. Nothing here calls src."""

import math

import torch
from plain import rotated


def sigma(x):
    return torch.nn.functional.elu(x) + 1


def read(q, matrix, total):
    """One query [D] of a memory."""
    return (sigma(q) @ matrix) / (sigma(q) @ total)


def fold(matrix, total, k, v, rule, empty):
    """The memory with a segment's tokens in it; all of them see the memory as it was."""
    new_matrix, new_total = matrix.clone(), total.clone()
    for key, value in zip(k, v, strict=True):
        known = read(key, matrix, total) if rule == "delta" and not empty else 0.0
        new_matrix += torch.outer(sigma(key), value - known)
        new_total += sigma(key)
    return new_matrix, new_total


def infini(q, k, v, segment, rule, gates, inv_freq=None):
    """out [B, Hq, T, Dv]; gates [Hq] before the sigmoid; the first segment has no memory to read."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, count, dim = q.shape
    length, group, first = k.shape[2], heads // k.shape[1], k.shape[2] - count
    out = torch.empty(batch, heads, count, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for one in range(k.shape[1]):
            keys, values = k[b, one], v[b, one]
            turned = keys if inv_freq is None else rotated(keys, list(range(length)), inv_freq)
            matrix, total = torch.zeros(dim, v.shape[-1]).double(), torch.zeros(dim).double()
            for begin in range(0, length, segment):
                end = min(length, begin + segment)
                for t in range(max(first, begin), end):
                    for h in range(one * group, (one + 1) * group):
                        query = q[b, h, t - first]
                        at = query if inv_freq is None else rotated(query.unsqueeze(0), [t], inv_freq)[0]
                        weights = torch.softmax(turned[begin : t + 1] @ at / math.sqrt(dim), 0)
                        local = weights @ values[begin : t + 1]
                        gate = 1 / (1 + math.exp(-float(gates[h])))
                        remembered = local if begin == 0 else read(query, matrix, total)
                        out[b, h, t - first] = gate * remembered + (1 - gate) * local
                if end - begin == segment:
                    matrix, total = fold(matrix, total, keys[begin:end], values[begin:end], rule, begin == 0)
    return out
