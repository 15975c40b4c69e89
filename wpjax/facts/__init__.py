"""Facts: where a model recalls them (causal tracing), and how one is rewritten in its weights (rank-one edits).

    facts         the file of facts, and where a fact's subject stands in its prompt
    tracing       corrupt the subject, restore one state at a time (arXiv 2202.05262, section 2)
    covariance    the second moment of what an MLP's down-projection reads
    rank_one      the edit of one fact in one down-projection (section 3 there)
    scores        what an edit did: efficacy, paraphrases, neighbours

(docs/facts.md)
"""

from wpjax.facts.facts import Fact, load_facts

__all__ = ["Fact", "load_facts"]
