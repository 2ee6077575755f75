"""RULER: 13 tasks that ask more of a long context than finding one sentence (arXiv 2404.06654; github NVIDIA/RULER).

    from longspan.evals.questions.making import examples
    from longspan.evals.ruler.tasks import RULER
    for example in examples(RULER, "vt", tokenizer.encode, length=8192, count=20, seed=0): ...

Configurations, haystacks, counts, tokens of an answer and scoring are the paper's. What differs is told at the head of
each family's file: `niah`, `tracking`, `common`, `frequent`, `documents`. The wording of instructions is our own, and
so are word lists and passages, so that nothing is downloaded: scores compare runs made here, not published tables.
"""
