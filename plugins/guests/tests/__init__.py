"""Tests of qvm-guests; none but test_network needs a network."""
