"""VFIO in pure Python, standard library only: a guard process imports it with ``python -I -S``."""
