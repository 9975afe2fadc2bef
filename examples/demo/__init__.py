"""The demonstration: embedded models, unseen prompts, a fair measurement.

``models`` finds the small trained models, ``inflate`` turns one into a larger
model that computes the same function, ``prompts`` reads text that no embedded
model was trained on, and ``run`` measures.
"""
