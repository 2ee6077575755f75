"""The tree's equations as loops over queries and nodes, in float64. Nothing here calls src."""

import math

import torch


def rotated(x, position, frequencies):
    """x [D], channel i turned with channel i + D/2."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        c, s = math.cos(position * frequencies[i]), math.sin(position * frequencies[i])
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def plain_tree(q, k, v, *, frequencies=None, trained=None, **options):
    """out [B, Hq, T, Dv] in float64."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    own = k
    if frequencies is not None:
        turned = [rotated(k[:, :, j].movedim(-1, 0), j, frequencies).movedim(0, -1) for j in range(k.shape[2])]
        own = torch.stack(turned, 2)
    for b in range(q.shape[0]):
        for i in range(q.shape[2]):
            t = k.shape[2] - q.shape[2] + i
            true = frequencies is None or t < trained
            out[b, :, i] = plain_query(q[b, :, i], k[b], own[b], v[b], t, true, frequencies, **options)
    return out


def plain_query(
    q, k, own, v, t, true, frequencies,
    *, beam, leaves, window, sinks=4, who="head", open_by="bounds", coarse=True, chosen=(), unreadable=(),
    dtype=torch.float64,
):  # fmt: skip
    """out [Hq, Dv] of q [Hq, D] at t; own are the keys k [Hkv, N, D] at their positions, to be read there or not."""
    out = torch.empty(len(q), v.shape[-1], dtype=torch.float64)
    group, scale = len(q) // len(k), 1 / math.sqrt(q.shape[-1])
    begin = max(0, t - window + 1) // 64 * 64
    old = begin // 64
    sink_pages = math.ceil(sinks / 64)
    keys = own if true else k  # what nodes are made of
    # Beyond the trained length a node's mean key stands directly before the window, at position 0.
    here = t if true else t + 1 - begin
    qs = [row if frequencies is None else rotated(row, here, frequencies) for row in q]

    def tokens(node):
        level, index = node
        return slice(index * 64 * 16**level, (index + 1) * 64 * 16**level)

    def mean(held):
        """As it is kept, rounded to the type of keys and values."""
        return held.mean(0).to(dtype).double()

    def weight(head, node):
        """Logarithm of the weight of a node that stands for its tokens."""
        held = keys[head // group][tokens(node)]
        return math.log(len(held)) + float(qs[head] @ mean(held)) * scale

    def bound(head, node):
        held = keys[head // group][tokens(node)]
        return float(torch.maximum(qs[head] * held.amin(0), qs[head] * held.amax(0)).sum()) * scale

    def best(heads, candidates, count, last):
        """The candidates that a set of query heads opens."""
        votes = dict.fromkeys(candidates, 0.0)
        for head in heads:
            scores = {node: (weight if open_by == "mean" else bound)(head, node) for node in candidates}
            top = max(scores.values())
            total = sum(math.exp(s - top) for s in scores.values())
            for node in candidates:
                votes[node] += math.exp(scores[node] - top) / total
        for node in candidates:
            level, index = node
            inside = [rank for rank, page in enumerate(chosen) if page // 16**level == index]
            if who == "model":
                if last:
                    votes[node] = -math.inf
                if inside:
                    votes[node] = 1e6 - inside[0]
            if index < math.ceil(sink_pages / 16**level):
                votes[node] = math.inf
            if last and index in unreadable:
                votes[node] = -math.inf
        order = sorted(candidates, key=lambda node: (-votes[node], -node[1]))
        return {node for node in order[:count] if votes[node] > -math.inf}

    everyone = range(len(q))
    for heads in [everyone] if who == "layer" else [everyone[g : g + group] for g in range(0, len(q), group)]:
        stand, opened, level = [], set(), 0
        while 16 ** (level + 1) <= old:
            level += 1
        while level >= 0 and old:
            candidates = [(level, root) for root in range(16 * (old // 16 ** (level + 1)), old // 16**level)]
            candidates += [(level, 16 * index + child) for _, index in opened for child in range(16)]
            widest = max(beam, leaves) if who == "model" else beam
            opened = best(heads, candidates, leaves if level == 0 else widest, level == 0)
            stand += [node for node in candidates if node not in opened]
            level -= 1
        far = [j for page in sorted(index for _, index in opened) for j in range(page * 64, page * 64 + 64)]
        for head in heads:
            logits, values, query = [], [], q[head]
            if frequencies is not None:
                query = rotated(query, t if true else len(far) + t - begin, frequencies)
            for place, j in enumerate([*far, *range(begin, t + 1)]):
                key = k[head // group, j]
                if frequencies is not None:
                    key = own[head // group, j] if true else rotated(key, place, frequencies)
                logits.append(float(query @ key) * scale)
                values.append(v[head // group, j])
            for node in stand if coarse else ():
                logits.append(weight(head, node))
                values.append(mean(v[head // group, tokens(node)]))
            out[head] = torch.softmax(torch.tensor(logits, dtype=torch.float64), 0) @ torch.stack(values)
    return out
