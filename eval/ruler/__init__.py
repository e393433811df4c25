"""RULER's thirteen synthetic tasks (2404.06654, github.com/NVIDIA/RULER), made from scratch.

Prompts, parameters and scoring are RULER's; the differences are listed in ``docs/ruler.md``.
"""
