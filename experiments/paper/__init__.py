"""The paper's pipeline on a pair: anchor, sources, flow, executors, curves, for every task of a config."""
