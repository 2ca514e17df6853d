"""Contracts between the services: events, wire, subjects, configuration, evidence.  Imports none of ours."""

VERSION = "0.1.0"
