"""Independent, slow versions of the mechanisms' equations: loops over queries, float64. Nothing here calls src."""

import math

import torch


def allowed_softmax(q, k, v, allowed, scale=None):
    """Softmax attention of one query head row: q [D], k [N, D], v [N, Dv], allowed: indexes."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    weights = torch.softmax((k[allowed] @ q) * scale, 0)
    return weights @ v[allowed]


def per_query(q, k, v, keys_of):
    """out [B, Hq, T, Dv] where the query at t of head h attends keys_of(b, h, t)."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, count, _ = q.shape
    group = heads // k.shape[1]
    first = k.shape[2] - count
    out = torch.empty(batch, heads, count, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(count):
                out[b, h, i] = allowed_softmax(q[b, h, i], k[b, h // group], v[b, h // group], keys_of(b, h, first + i))
    return out


def dense(q, k, v):
    return per_query(q, k, v, lambda b, h, t: list(range(t + 1)))


def streaming(q, k, v, window, sinks):
    return per_query(
        q, k, v, lambda b, h, t: sorted(set(range(min(sinks, t + 1))) | set(range(max(0, t - window + 1), t + 1)))
    )


def retrieval(q, k, v, window, sinks, chosen, neighbours, page=64):
    def keys(b, h, t):
        far = set(range(sinks))
        for c in chosen:
            far |= set(range((c - neighbours) * page, (c + neighbours + 1) * page))
        return sorted({j for j in far if 0 <= j <= t} | set(range(max(0, t - window + 1), t + 1)))

    return per_query(q, k, v, keys)


def superlinear_parts(t, window, power):
    """The rounded window and the anchors of a query at t, newest first, from the paper's definition."""
    steps = []
    i = 1
    while True:
        step = (
            math.floor(i ** (1 / power) + 1e-12) if abs(1 / power - round(1 / power)) > 1e-12 else i ** round(1 / power)
        )
        steps.append(step)
        if step > max(t + 1, window + 1):
            break
        i += 1
    whole = min(s - 1 for s in steps if s - 1 >= window)
    anchors = [t - s + 1 for s in steps if 0 <= t - s + 1 <= t - whole]
    return whole, sorted(anchors, reverse=True)


def superlinear(q, k, v, window, spans, backward, forward, power, span_power, gate, summary, routing=None, page=64):
    q, k, v = q.double(), k.double(), v.double()
    routing = q if routing is None else routing.double()
    batch, heads, count, _ = q.shape
    group = heads // k.shape[1]
    first = k.shape[2] - count
    out = torch.empty(batch, heads, count, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kk, vv = k[b, h // group], v[b, h // group]
            for i in range(count):
                t = first + i
                n = t + 1
                whole, anchors = superlinear_parts(t, window, power)
                near = set(range(max(0, t - whole + 1), t + 1))
                scored = []
                for a in anchors:
                    if summary == "key":
                        s = float(routing[b, h, i] @ kk[a])
                    else:
                        block = kk[a // page * page : a // page * page + page]
                        s = float(
                            torch.maximum(routing[b, h, i] * block.amin(0), routing[b, h, i] * block.amax(0)).sum()
                        )
                    scored.append((s, a))
                best = sorted(scored, key=lambda item: (-item[0], -item[1]))[:spans]
                found = []
                for s, a in best:
                    lo = max(0, a - math.ceil(backward * n**span_power))
                    hi = min(a + math.ceil(forward * n**span_power), t - whole)
                    found.append((s, set(range(lo, hi + 1))))
                if not found or gate == "joint":
                    union = near.union(*(keys for _, keys in found))
                    out[b, h, i] = allowed_softmax(q[b, h, i], kk, vv, sorted(union))
                else:
                    weights = torch.softmax(torch.tensor([s for s, _ in found], dtype=torch.float64), 0)
                    parts = [allowed_softmax(q[b, h, i], kk, vv, sorted(near | keys)) for _, keys in found]
                    out[b, h, i] = sum(w * p for w, p in zip(weights, parts, strict=True))
    return out
