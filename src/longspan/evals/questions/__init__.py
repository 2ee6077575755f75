"""How questions of evals are made: examples of an exact length, what haystacks are made of, how answers are scored.

    from longspan.evals.questions.making import example
    from longspan.evals.questions.registry import evaluation
    made = example(evaluation("ruler"), "vt", tokenizer.encode, length=8192, index=0, seed=0)

It does not know models: who is asked is the business of `longspan.evals.asking`.
"""
