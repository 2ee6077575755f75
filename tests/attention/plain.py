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


def rotated(x, positions, inv_freq):
    """Rotate x [..., N, D] to positions [N]: channel i and channel i + half are one complex number."""
    half = len(inv_freq)
    turn = torch.polar(
        torch.ones(len(positions), half).double(), torch.outer(torch.tensor(positions).double(), inv_freq)
    )
    pairs = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
    return torch.cat([pairs.real, pairs.imag, x[..., 2 * half :]], -1)


def read_in_order(q, k, v, t, keys, inv_freq, trained):
    """One query head at t that reads keys [F] (ascending): at their positions, or beyond `trained` at 0, 1, 2, ..."""
    if inv_freq is None:
        return allowed_softmax(q, k, v, keys)
    own = trained is None or t < trained
    q = rotated(q.unsqueeze(0), [t if own else len(keys) - 1], inv_freq)[0]
    return allowed_softmax(q, rotated(k[keys], keys if own else list(range(len(keys))), inv_freq), v[keys], slice(None))


def sparse_keys(t, window, sinks, density=1.0):
    stride = math.ceil(math.sqrt(t + 1) / density)
    return [j for j in range(t + 1) if t - j < window or j < sinks or (t - j) % stride == 0]


def sparse(q, k, v, window, sinks, density=1.0, inv_freq=None, trained=None):
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        t, one = k.shape[2] - q.shape[2] + i, h // (q.shape[1] // k.shape[1])
        keys = sparse_keys(t, window, sinks, density)
        out[b, h, i] = read_in_order(q[b, h, i], k[b, one], v[b, one], t, keys, inv_freq, trained)
    return out


def quest_shares(q, k, before, block):
    """The shares [Hq, before] of a softmax of the bounds of blocks: q [Hq, D], k [Hkv, N, D]."""
    bound = torch.empty(len(q), before, dtype=torch.float64)
    for h in range(len(q)):
        pages = k[h // (len(q) // len(k)), : before * block].view(before, block, k.shape[-1])
        bound[h] = torch.maximum(q[h] * pages.amin(1), q[h] * pages.amax(1)).sum(-1)
    return torch.softmax(bound / math.sqrt(q.shape[-1]), -1)


def sparq_shares(q, k, before, block, channels):
    """The mass [Hq, before] of blocks by the scores of algorithm 1, whose channels a group of heads shares."""
    mass = torch.zeros(len(q), before, dtype=torch.float64)
    group = len(q) // len(k)
    for h in range(len(q)):
        together = q[h // group * group : (h // group + 1) * group].abs().sum(0).tolist()
        used = sorted(range(len(together)), key=lambda d: (-together[d], d))[:channels]
        tau = q[h, used].abs().sum() / q[h].abs().sum()
        scores = k[h // group, : before * block][:, used] @ q[h, used] / math.sqrt(q.shape[-1] * tau)
        for j, weight in enumerate(torch.softmax(scores, 0).tolist()):
            mass[h, j // block] += weight
    return mass


def quest_blocks(
    q, k, t, start, budget, window, sinks, who, chosen_pages, block, inv_freq=None, trained=None, channels=None
):
    """The blocks before `start` that each KV head reads for one position: q [Hq, D], k [Hkv, N, D]."""
    heads, kv_heads, before = q.shape[0], k.shape[0], start // block
    first = min(before, math.ceil(sinks / block))
    read = max(math.ceil(sinks / block) + 1, (budget - (window + block - 1)) // block)
    if who == "model":
        order = [page * 64 // block + i for page in chosen_pages for i in range(64 // block)]
        order = [p for p in order if first <= p < before]
        return [[*range(first), *order][:read]] * kv_heads
    if inv_freq is not None and (trained is None or t < trained):
        q, k = rotated(q.unsqueeze(1), [t], inv_freq)[:, 0], rotated(k, list(range(k.shape[1])), inv_freq)
    share = quest_shares(q, k, before, block) if channels is None else sparq_shares(q, k, before, block, channels)
    chosen = []
    for one in range(kv_heads):
        voters = range(heads) if who == "layer" else range(one * heads // kv_heads, (one + 1) * heads // kv_heads)
        votes = sum(share[h] for h in voters)
        best = sorted(range(first, before), key=lambda p: -float(votes[p]))
        chosen.append([*range(first), *best][:read])
    return chosen


def quest(
    q, k, v, budget, window, sinks, who="head", chosen_pages=(), block=16, inv_freq=None, trained=None, channels=None
):
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            t = k.shape[2] - q.shape[2] + i
            start = max(0, t - window + 1) // block * block
            blocks = quest_blocks(
                q[b, :, i], k[b], t, start, budget, window, sinks, who, chosen_pages, block, inv_freq, trained, channels
            )
            for h in range(q.shape[1]):
                one = h // (q.shape[1] // k.shape[1])
                far = [p * block + j for p in sorted(blocks[one]) for j in range(block)]
                keys = [*far, *range(start, t + 1)]
                out[b, h, i] = read_in_order(q[b, h, i], k[b, one], v[b, one], t, keys, inv_freq, trained)
    return out


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


def superlinear(
    q, k, v, window, spans, backward, forward, power, span_power, gate, summary, sinks=0, routing=None, page=64
):
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
                near = set(range(max(0, t - whole + 1), t + 1)) | set(range(min(sinks, t + 1)))
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
