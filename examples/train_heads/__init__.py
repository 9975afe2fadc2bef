"""Medusa heads for your own model: training and measuring.

    python -m examples.train_heads train --model MODEL --data text.txt --out heads
    python -m examples.train_heads calibrate --model MODEL --heads heads --prompts prompts.txt

Runs from the root of a clone. ``vllm_specplugin.heads`` loads what this writes.
"""
