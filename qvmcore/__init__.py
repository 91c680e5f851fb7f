"""qvmcore: the minimal core of qvm. Importing it loads no plugin and opens nothing."""

__version__ = "0.1.0"
