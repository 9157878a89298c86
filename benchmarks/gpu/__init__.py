"""`make gpu-check`: the kernels' tests, the gpu tests and the GPU rows of the benchmarks, in one command of bounded time.

The machine needs torch with CUDA, Triton, transformers, pytest and pytest-benchmark, and nothing else: no network, no
installed advvl. Every section runs in processes of its own, which append what they find, line by line, to one file; the
command folds it into a JSON and a page that are whole at every moment.

    python -m benchmarks.gpu [--device cpu --smoke] [--minutes 8] [--out FOLDER] [--only SECTION ...]
"""
