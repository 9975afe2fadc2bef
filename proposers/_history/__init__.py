"""Drafts copied from earlier text: what ``suffix`` and ``ngram`` share."""
