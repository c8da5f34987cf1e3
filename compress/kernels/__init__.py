"""Kernels for packed weights, and `pack`, the reference in plain torch that says what each must compute."""
