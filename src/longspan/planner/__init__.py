"""Memory, time and money before anything runs: what a model needs for a context, on which device, by which mechanism.

A config.json becomes a `Model` of layers (`reading`, `families`, `blocks`); `memory` says what it takes, `times` how
long by the registry's costs and a device's roofline, corrected by what was measured (`measured`); `plan` puts these
together, `decide` chooses, `cost` counts money. Data with sources: `devices.json`, `prices.json`; `measured.json` is
made from `benchmarks/results`. It loads no model, and torch only where a mechanism's cost is asked for.
"""
