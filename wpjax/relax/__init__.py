"""Learned masks: which few weights of the expert carry its behaviour together? Found by gradient.

A relaxed mask is differentiable (`patching.PatchMask`), so that it can be learned:

    gates            which weights each gate opens, and how many parameters that is
    parametrisation  how numbers that an optimiser moves become gates: nested, hard-concrete, straight-through
    objective        a function loss(mask, key) -> scalar; any other will do
    learn            the loop: one compiled program takes whole steps

Everything is a pytree or a pure function, so each piece can be replaced (docs/method.md, "Learned masks").
"""
