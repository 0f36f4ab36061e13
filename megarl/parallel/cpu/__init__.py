"""Make the unmodified ``megatron.core`` run on CPU over gloo. Only ``megarl.parallel.platform`` imports this.

``torch_view`` is the torch that Megatron's modules see, ``accommodations`` says what else has to give and why,
``import_hook`` applies both to each Megatron module as it is imported. torch itself stays an honest CPU torch for
everybody else: Ray, transformers and vLLM see no CUDA. ``products`` has it multiply by what is faster here.
"""
