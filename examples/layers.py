"""Stands in for what fastattn.layers will have: the same interface, in NumPy."""

import math

import numpy as np


class Linear:
    def __init__(self, weight, bias=None):
        self.weight = np.array(weight)
        self._w = np.ascontiguousarray(self.weight, dtype=np.result_type(self.weight, np.float32))
        self.bias = None if bias is None else np.array(bias)
        self.d_in, self.d_out = self.weight.shape
        self.dtype = self.weight.dtype

    def __call__(self, x, *, activation=None, multiply=None, residual=None, out=None, num_threads=None):
        y = (x.reshape(-1, self.d_in) @ self._w.astype(np.result_type(x, self._w), copy=False)).reshape(
            *x.shape[:-1], self.d_out
        )
        if self.bias is not None:
            y += self.bias
        if activation == "silu":
            with np.errstate(over="ignore"):
                y /= 1 + np.exp(-y)
        elif activation == "gelu":
            y *= 0.5 + 0.5 * np.frompyfunc(math.erf, 1, 1)(y / math.sqrt(2)).astype(y.dtype)
        elif activation is not None:
            raise ValueError(activation)
        if multiply is not None:
            y *= multiply
        if residual is not None:
            y += residual
        return y


def rms_norm(x, weight=None, *, eps=1e-6, residual=None, return_sum=False):
    s = x if residual is None else x + residual
    y = s / np.sqrt(np.mean(s * s, axis=-1, keepdims=True) + s.dtype.type(eps))
    y = y if weight is None else y * weight
    return (y, s) if return_sum else y


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, return_sum=False):
    s = x if residual is None else x + residual
    y = s - s.mean(axis=-1, keepdims=True)
    y /= np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + s.dtype.type(eps))
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    return (y, s) if return_sum else y


if not hasattr(__import__("fastattn").MultiHeadAttention, "project_context"):
    __import__("fastattn").MultiHeadAttention.project_context = lambda self, context, context_lengths=None: context
