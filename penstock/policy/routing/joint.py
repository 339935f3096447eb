"""Prototype."""
from __future__ import annotations
import os
from random import Random
import numpy as np
from penstock.policy.routing.api import *
from penstock.policy.routing.api import cheapest, least

def flag(name, default):
    return float(os.environ.get("J_" + name, default))
K = flag("K", 1); E = flag("E", 0); I = flag("I", 1); OWN = flag("OWN", 1); OTHERS = flag("OTHERS", 1); BACK = flag("BACK", 1); CAP = flag("CAP", 0.95); EXP=flag("EXP",1); KC=flag("KC",0); POOL=flag("POOL",1); OUT=flag("OUT",128); DM=flag("DM",0); IP=flag("IP",1); NOPAIR=flag("NOPAIR",0)

def route(now, ask, fleet, rng):
    n = len(fleet.names)
    P, D = fleet.prefillers, fleet.decoders
    tokens = float(ask.prompt_tokens)
    cached = ask.cached_tokens
    S = fleet.prompt_s(tokens - cached, cached)  # at each worker with its own cache
    W = fleet.wait_s
    rho = np.minimum(fleet.busy_share, CAP)
    lam = fleet.arrivals_per_s
    if POOL:
        pre = fleet.prefers_prefill
        for mask in (pre, ~pre):
            if mask.any():
                rho = np.where(mask, rho[mask].mean(), rho); lam = np.where(mask, lam[mask].mean(), lam)
    out = min(ask.max_tokens, OUT)
    B = fleet.streams
    step = fleet.decode_step_s
    def price(w, s, wait):
        return K * lam[w] * s * (wait + s / 2) / (1 - rho[w]) + KC * s
    seq_s, read_s = fleet.prices[2:]
    used = fleet.used_blocks * fleet.block_tokens
    if DM: decode = (OWN + OTHERS) * out / 32 * step * B
    else: decode = out * (OWN * (seq_s * B + read_s * used) + OTHERS * B * (seq_s + read_s * tokens))
    Bi = B
    if IP:
        Bi = B.copy()
        for mask in (fleet.prefers_prefill & ~fleet.prefers_decode, fleet.prefers_decode):
            if mask.any(): Bi = np.where(mask, B[mask].mean(), Bi)
    best, arg = np.inf, None
    A_own = W + S + np.array([price(w, S[w], W[w]) for w in range(n)]) + I * S * Bi + decode
    for d in D:
        if A_own[d] < best: best, arg = float(A_own[d]), (None, int(d))
    X = (tokens - cached) * ask.token_bytes
    for p in (P if not NOPAIR else []):
        path = fleet.path(int(p))
        for d in D:
            if d == p or not np.isfinite(path.start_s[d]): continue
            if fleet.shares_memory(int(p), int(d)):
                s = S[d]; move = path.start_s[d]; hidden = 0
            else:
                s = S[p]
                back = BACK * (fleet.outgoing_bytes[p] + fleet.incoming_bytes[d])
                T = path.byte_s[d] * (X[d] + back)
                u = max(1.0, tokens - cached[p])
                c = min(1.0, fleet.chunk_tokens[p] / u)
                last = path.byte_s[d] * min(X[d], fleet.chunk_tokens[p] * ask.token_bytes)
                move = path.start_s[d] + (max(last, T + s * c - s) if EXP else T)
                move += E * path.byte_s[d] * X[d]
            cost = W[p] + s + move + price(p, s, W[p]) + I * s * Bi[p] + decode[d]
            if cost < best: best, arg = float(cost), (int(p), int(d))
    p, d = arg
    if p is None:
        return Choice(fleet.names[d], (), best)
    return Choice(fleet.names[d], (fleet.names[p],), best, float(W[p]))
ROUTING = route
