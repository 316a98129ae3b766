"""Answers to the claims of claims.py: functions from rows to findings, one for every size that was measured."""
