"""PyTorch's kernels on the problems that bench/run.ts times; one JSON request a line, one answer a line."""

import json
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def block_lists(problem, create_block_mask):
    """Lists drawn as bench/cases.ts draws its own: as many blocks, not the same."""
    sq, sk, hq, block, top = (problem[name] for name in ("sq", "sk", "hq", "blocks", "top"))
    rows, columns = -(-sq // block), -(-sk // block)
    number = torch.rand(hq, rows, columns, device="cuda")
    row, column = (torch.arange(n, device="cuda") for n in (rows, columns))
    last = row[:, None] + columns - rows
    if top:
        listed = torch.zeros_like(number, dtype=torch.bool).scatter_(2, number.topk(top).indices, True)
    else:
        listed = ((number < problem["density"]) | (column == 0) | (column == last)) & (column <= last)
    causal = problem["causal"]

    def sees(_b, h, i, j):
        seen = listed[h, i // block, j // block]
        return seen & (j <= i + sk - sq) if causal else seen

    return torch.compile(create_block_mask)(sees, None, hq, sq, sk, BLOCK_SIZE=block)


def attention(problem):
    b, sq, sk, hq, hk, d, dv = (problem[name] for name in ("b", "sq", "sk", "hq", "hk", "d", "dv"))
    window, causal = problem["window"], problem["causal"]
    draw = lambda s, h, e: torch.randn(b, s, h, e, dtype=DTYPES[problem["dtype"]], device="cuda").transpose(1, 2)
    q, k, v = draw(sq, hq, d), draw(sk, hk, d), draw(sk, hk, dv)

    def sdpa(backend):
        def run():
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=hq != hk)

        run.inputs = (q, k, v)
        return run

    def flex():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(_b, _h, i, j):
            at = i + sk - sq
            return (j <= at) & (j > at - window) if window else j <= at

        mask = create_block_mask(sees, None, None, sq, sk) if causal or window else None
        if problem["blocks"]:
            mask = block_lists(problem, create_block_mask)
        compiled = torch.compile(flex_attention, dynamic=False)
        slopes = torch.exp2(-8 * torch.arange(1, hq + 1, device="cuda") / hq)
        bias = torch.randn(sq, sk, dtype=q.dtype, device="cuda") if problem["bias"] else None
        scored = None
        if problem["slopes"]:
            scored = lambda score, _b, h, i, j: score + slopes[h] * (j - i - sk + sq)
        if problem["bias"]:
            scored = lambda score, _b, _h, i, j: score + bias[i, j]
        run = lambda: compiled(q, k, v, score_mod=scored, block_mask=mask, enable_gqa=hq != hk)
        run.inputs = (q, k, v)
        return run

    peers = {}
    if problem["sigmoid"] or problem["reweighted"]:
        return peers
    if problem["blocks"] or problem["slopes"] or problem["bias"]:
        return {"flex": flex}
    # PyTorch aligns causal masks to the top left, so only squares compare
    if not window and (not causal or sq == sk):
        peers["cudnn"] = lambda: sdpa(SDPBackend.CUDNN_ATTENTION)
        peers["flash"] = lambda: sdpa(SDPBackend.FLASH_ATTENTION)
    if window and sq > 1:
        peers["flex"] = flex
    return peers


def attention_backward(problem):
    peers = attention(problem)

    def backward(prepare):
        def make():
            run = prepare()
            inputs = [x.requires_grad_() for x in run.inputs]
            out = run()
            gradient = torch.randn_like(out)
            return lambda: torch.autograd.grad(out, inputs, gradient, retain_graph=True)

        return make

    return {name: backward(prepare) for name, prepare in peers.items()}


def linear(problem):
    draw = lambda *shape: torch.randn(*shape, dtype=DTYPES[problem["dtype"]], device="cuda")
    x, weight = draw(problem["m"], problem["k"]), draw(problem["n"], problem["k"])
    return {"cublas": lambda: lambda: functional.linear(x, weight)}


PROBLEMS = {"attention": attention, "attention.backward": attention_backward, "linear": linear}


def milliseconds(run, times):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(times):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / times


def main():
    runs = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "round" in request:
            answer = milliseconds(runs[request["round"]], request["times"])
        else:
            runs, answer = {}, {}
            make = PROBLEMS.get(request["operator"], lambda problem: {})
            for name, prepare in make(request).items():
                try:
                    runs[name] = prepare()
                    milliseconds(runs[name], 2)
                    answer[name] = None
                except Exception as error:  # a backend that does not take the problem says why
                    runs.pop(name, None)
                    answer[name] = str(error).split("\n")[0]
            torch.cuda.synchronize()
        print(json.dumps(answer), flush=True)


main()
