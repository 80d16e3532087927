"""Parallel sampling: triangular systems and their solver (ParaTAA, arXiv 2402.09970)."""

from triskele.sampling.solver import NonFiniteError, Result, Solver, solve
from triskele.sampling.system import TriangularSystem

__all__ = ["NonFiniteError", "Result", "Solver", "TriangularSystem", "solve"]
