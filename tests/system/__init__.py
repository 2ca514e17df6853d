"""Tests of the whole node on the real kernel, a real NATS server and real processes."""
