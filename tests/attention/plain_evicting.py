"""Independent, slow versions of what evicts: a list of tokens a head. Loops, float64; nothing here calls src."""

import math

import torch
from plain import rotated


class Head:
    """One KV head: the tokens it holds, and what it saw."""

    def __init__(self, k, v):
        self.k, self.v, self.held, self.mass, self.seen, self.forgot = k, v, [], {}, [], False


def turned(x, positions, inv_freq):
    return x if inv_freq is None else rotated(x, positions, inv_freq)


def simulate(name, q, k, v, first=0, inv_freq=None, trained=None, **options):
    """Read the tokens from `first` on in stretches; those before it are held.

    q [Hq, N, D], k and v [Hkv, N, D]. Returns the outputs [Hq, N - first, Dv] and the tokens that each head holds at
    the end, after one more eviction.
    """
    q, k, v = q.double(), k.double(), v.double()
    group, n, every = q.shape[0] // k.shape[0], k.shape[1], options.get("every", 0)
    heads = [Head(k[h], v[h]) for h in range(k.shape[0])]
    for head in heads:
        head.held = list(range(first))
    out = torch.empty(q.shape[0], n - first, v.shape[-1], dtype=torch.float64)
    stops = [t for t in range(first + 1, n) if every and t % every == 0] + [n]
    for start, stop in zip([first, *stops], stops, strict=False):
        for h, head in enumerate(heads):
            for t in range(start, stop):
                head.held.append(t)
                own = trained is None or t < trained or not head.forgot
                keys = turned(k[h, head.held], head.held if own else list(range(len(head.held))), inv_freq)
                at = t if own else len(head.held) - 1
                for g in range(h * group, (h + 1) * group):
                    query = turned(q[g, t : t + 1], [at], inv_freq)[0]
                    weights = torch.softmax(keys @ query / math.sqrt(q.shape[-1]), 0)
                    out[g, t - first] = weights @ v[h, head.held]
                    for token, weight in zip(head.held, weights.tolist(), strict=True):
                        head.mass[token] = head.mass.get(token, 0.0) + weight
                head.seen.append(q[h * group : (h + 1) * group, t])
        evict(name, heads, stop, inv_freq, trained, **options)
    return out, [head.held for head in heads]


def evict(name, heads, n, inv_freq, trained, budget, sinks=4, window=32, same=True, safeguard=0.2, **options):
    if name == "rocketkv":
        c = max(1.0, n / budget)
        options["kernel"] = options.get("kernel", 63)
        keep = max(budget, int(n / c ** min(0.2 + 0.06 * math.log2(c), 0.8)))
    else:
        keep = budget
    if sum(len(head.held) for head in heads) <= keep * len(heads):
        return
    ranked, scored = [], []
    for head in heads:
        own = trained is None or n < trained or not head.forgot
        places = head.held if own else list(range(len(head.held)))
        score = SCORES[name](
            head, turned(head.k[head.held], places, inv_freq), places, n, own, inv_freq, sinks, **options
        )
        rows = len(head.held)
        sure = [i for i in range(rows) if i < sinks or i >= rows - window]
        rest = sorted((i for i in range(rows) if i not in set(sure)), key=lambda i: -score[i])
        ranked.append(sure + rest)
        scored.append(score)
    if same:
        counts = [keep] * len(heads)
    else:
        safe = max(int(safeguard * keep), sinks + window)
        counts = [min(safe, len(order)) for order in ranked]
        others = [(-scored[h][i], h) for h, order in enumerate(ranked) for i in order[safe:]]
        for _, h in sorted(others)[: keep * len(heads) - sum(counts)]:
            counts[h] += 1
    for head, order, count in zip(heads, ranked, counts, strict=True):
        if count < len(order):
            head.forgot = True
        head.held = [head.held[i] for i in sorted(order[:count])]


def h2o(head, keys, places, n, own, inv_freq, sinks, **options):
    return [head.mass.get(token, 0.0) for token in head.held]


def snapkv(head, keys, places, n, own, inv_freq, sinks, kernel=7, observed=32, **options):
    seen = head.seen[-observed:]
    rows, before = len(head.held), len(head.held) - len(seen)
    sums = [0.0] * before
    for i, queries in enumerate(seen):
        for query in queries:
            one = turned(query.unsqueeze(0), [places[before + i]], inv_freq)[0]
            weights = torch.softmax(keys[: before + i + 1] @ one / math.sqrt(len(one)), 0)
            sums = [a + b for a, b in zip(sums, weights.tolist(), strict=False)]
    reach = kernel // 2
    return [max(sums[max(0, i - reach) : i + reach + 1]) for i in range(before)] + [0.0] * (rows - before)


def expected(head, keys, places, n, own, inv_freq, sinks, future=512, epsilon=0.0, **options):
    start = n if own else len(head.held)
    total = [0.0] * len(head.held)
    first, dim = min(sinks, len(head.held)), keys.shape[-1]
    skipped = max(0, sinks - (n - len(head.seen)))
    for g in range(head.seen[0].shape[0]):
        queries = torch.stack([queries[g] for queries in head.seen[skipped:]])
        mean = queries.mean(0)
        covariance = sum(torch.outer(x - mean, x - mean) for x in queries) / len(queries)
        turn = torch.eye(dim, dtype=torch.float64)
        if inv_freq is not None:
            # A rotation is linear: its columns are what it makes of the unit vectors.
            each = [rotated(torch.eye(dim).double(), [t] * dim, inv_freq).T for t in range(start, start + future)]
            turn = torch.stack(each).mean(0)
        mean, covariance = turn @ mean, turn @ covariance @ turn.T
        logits = torch.stack([x @ mean / math.sqrt(dim) + x @ covariance @ x / (2 * dim) for x in keys[first:]])
        for i, share in enumerate(torch.softmax(logits, 0).tolist()):
            total[first + i] += share / head.seen[0].shape[0]
    norms = [float(torch.linalg.vector_norm(head.v[token])) for token in head.held]
    return [
        (share + epsilon) * norm if i >= first else 0.0
        for i, (share, norm) in enumerate(zip(total, norms, strict=True))
    ]


def keydiff(head, keys, places, n, own, inv_freq, sinks, **options):
    anchor = torch.stack([key / torch.linalg.vector_norm(key) for key in keys]).mean(0)
    return [float(-(anchor @ key) / (torch.linalg.vector_norm(anchor) * torch.linalg.vector_norm(key))) for key in keys]


SCORES = {"h2o": h2o, "snapkv": snapkv, "rocketkv": snapkv, "expected": expected, "keydiff": keydiff}


def rocket_decode(q, k, v, budget, kept):
    """The second stage for one query: q [Hq, D], k and v [Hkv, N, D] rotated as read; `kept` rows before the answer."""
    q, k, v = q.double(), k.double(), v.double()
    group, (kv_heads, n, dim) = q.shape[0] // k.shape[0], k.shape
    c = max(1.0, kept / budget)
    size = min(math.floor(c), math.ceil(math.sqrt(c)))
    r = min(dim, max(1, round(dim * size / c)))
    out = torch.empty(q.shape[0], v.shape[-1], dtype=torch.float64)
    for h in range(kv_heads):
        mine = q[h * group : (h + 1) * group]
        channels = sorted(range(dim), key=lambda d: -float(mine[:, d].abs().sum()))[:r]
        chunks = [list(range(i, min(i + size, n))) for i in range(0, n, size)]
        votes = [0.0] * n
        for query in mine:
            scores = []
            for chunk in chunks:
                best = {d: (k[h, chunk, d].max() if mine[:, d].sum() > 0 else k[h, chunk, d].min()) for d in channels}
                scores += [sum(float(query[d] * best[d]) for d in channels)] * len(chunk)
            part = sum(abs(float(query[d])) for d in channels) / float(query.abs().sum())
            shares = torch.softmax(torch.tensor(scores).double() / math.sqrt(dim * part), 0).tolist()
            votes = [a + b for a, b in zip(votes, shares, strict=True)]
        chosen = sorted(range(n), key=lambda i: -votes[i])[: max(1, budget // 2)]
        for g, query in enumerate(mine):
            weights = torch.softmax(k[h, chosen] @ query / math.sqrt(dim), 0)
            out[h * group + g] = weights @ v[h, chosen]
    return out
