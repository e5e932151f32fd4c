"""Comparative benchmarks, `python -m benchmarks COMMAND`, one package a command:

    kernel     one layer's attention: BMC, vLLM's CPU_ATTN and torch's sdpa
    step       a whole decode step of vLLM: BMC against CPU_ATTN
    generate   a decode step of Hugging Face generation and DeepSpeed, with BMC and without
    speculation  draft tokens: BMC's controller, fixed lengths, and the frameworks' own
    growth     the r that the analytical model picks against measured times
    pool       block tables of a worn KV pool: BMC's block managers against vLLM's own
    overhead   microseconds of a layer of vLLM before anything is computed: BMC against CPU_ATTN
    sampling   drawing and verifying a step's tokens in vLLM: BMC's samplers against its own

Promises that every number stands beside its peers' and beside this machine's measured ceilings,
all from one run, and that a system whose answer is wrong fails the run. `lib` knows no command,
`engines` (whole frameworks) neither, and no command knows another.
"""
