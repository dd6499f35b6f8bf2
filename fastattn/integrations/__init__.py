"""Attention and its gradients in other people's frameworks. Nothing is imported here: name the module that you want.

    fastattn.integrations.torch           PyTorch tensors on the CPU, with torch.autograd, also in compiled graphs
    fastattn.integrations.transformers    models of Hugging Face's Transformers, attn_implementation="fastattn"
    fastattn.integrations.jax             JAX arrays, under jit, grad and vmap; `nn` there has the arguments of jax.nn
    fastattn.integrations.autograd        HIPS autograd: arrays of autograd.numpy
    fastattn.integrations.dask            Dask arrays: more keys than one machine holds
    fastattn.integrations.onnx            operators for ONNX's reference evaluator
    fastattn.integrations.sklearn         kernel regression and classification, as estimators of scikit-learn

Those for PyTorch, JAX and autograd have the functions of fastattn that have gradients, by the same names and with the
same arguments (but `out`); Dask's has `dot_product_attention` and `merge_attention`, without gradients.
"""
