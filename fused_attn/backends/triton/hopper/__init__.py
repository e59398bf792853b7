"""Kernels for Hopper (compute capability 9.0) in Gluon: TMA copies, warpgroup products, warps with roles of their own.

``eligible`` says which calls they take; every other one runs on the plain kernels beside this folder, and so do single heads or rows that
hold NaN or scores beyond what one rounding per exponent allows. Nothing here is imported where no call is eligible.
"""
