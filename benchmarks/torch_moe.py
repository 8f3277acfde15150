"""Times the exported MoE layer in PyTorch against a masked loop, a dense layer, and its own products.

    python -m benchmarks.torch_moe                       # the sizes of benchmarks/moe_block.py
    python -m benchmarks.torch_moe --device=cuda --tokens=25700 --width=1024 --hidden=4096 --dtype=bfloat16

The masked loop is the released code's way: for each expert a mask over tokens, rows gathered by it, and
`index_add_`. "products alone" multiplies as many rows by the same matrices and does nothing else: what any
implementation of these sizes must at least take. Runs are interleaved; the ratio is the median of the ratios
of each round.
"""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional

from benchmarks import timing
from clipmoe_jax.interop.modeling_clip_moe import MLP, CLIPMoEVisionConfig, MoE


class MaskedLoop(nn.Module):
    """The same layer and numbers, expert by expert, each with linear layers of its own.

    router_logits: of the last call. dropout: after the activation, while it trains.
    """

    def __init__(self, moe: MoE, dropout: float = 0.0):
        super().__init__()
        self.num_selected = moe.num_selected
        self.router = nn.Linear(*moe.router.weight.t().shape, bias=False)
        self.router.weight = moe.router.weight
        self.dropout, self.router_logits = nn.Dropout(dropout), None
        layers = (moe.fc1.weight, moe.fc1.bias, moe.fc2.weight, moe.fc2.bias)
        self.experts = nn.ModuleList([_expert(*parts) for parts in zip(*layers, strict=True)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, D) -> (…, D)."""
        shape, x = x.shape, x.flatten(0, -2)
        logits = self.router(x)
        self.router_logits = logits.unflatten(0, shape[:-1])
        probabilities = logits.softmax(dim=-1, dtype=torch.float32)
        gates, expert_ids = probabilities.topk(self.num_selected, dim=-1)
        gates = (gates / gates.sum(dim=-1, keepdim=True)).to(x.dtype)
        masks = functional.one_hot(expert_ids, len(self.experts)).permute(2, 1, 0)
        y = torch.zeros_like(x)
        for (fc1, fc2), mask in zip(self.experts, masks, strict=True):
            place, token = torch.where(mask)
            h = fc1(x[token])
            h = self.dropout(h * torch.sigmoid(1.702 * h))
            y.index_add_(0, token, fc2(h) * gates[token, place, None])
        return y.view(shape)

    def products_alone(self, x: torch.Tensor) -> torch.Tensor:
        """Multiplies N * K rows, split evenly over the experts, by both matrices of each."""
        groups = x.repeat(self.num_selected, 1).chunk(len(self.experts))
        both = zip(groups, self.experts, strict=True)
        return sum((rows @ fc1.weight.t() @ fc2.weight.t()).sum() for rows, (fc1, fc2) in both)


def run_exported(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """Routes and runs the exported layer. x (N, D) -> (N, D)."""
    tokens = x.unsqueeze(0)
    return moe(tokens, moe.route(tokens)).squeeze(0)


def _expert(*parts: torch.Tensor) -> nn.ModuleList:
    (weight1, bias1, weight2, bias2) = (nn.Parameter(part.detach().clone()) for part in parts)
    fc1, fc2 = nn.Linear(*weight1.t().shape), nn.Linear(*weight2.t().shape)
    fc1.weight, fc1.bias, fc2.weight, fc2.bias = weight1, bias1, weight2, bias2
    return nn.ModuleList([fc1, fc2])


def main() -> None:
    """Measures and prints the table of docs/interop.md."""
    parser = timing.moe_parser(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = CLIPMoEVisionConfig(
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_experts=args.experts,
        num_experts_per_tok=args.selected,
    )
    moe, mlp = MoE(config), MLP(config)
    for parameter in [*moe.parameters(), *mlp.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02)
    loop = MaskedLoop(moe)
    x = torch.randn(args.tokens, args.width)
    difference = (run_exported(moe, x) - loop(x)).abs().max().item()
    where = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    moe, mlp, loop, x = (thing.to(**where) for thing in (moe, mlp, loop, x))
    layers = {
        "masked loop": loop,
        "exported": lambda x: run_exported(moe, x),
        "products alone": loop.products_alone,
        "dense layer": mlp,
    }

    def forward(layer):
        with torch.no_grad():
            layer(x)

    def forward_and_gradient(layer):
        """Takes the gradient of inputs and all parameters: the exported module trains whole."""
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        for module in (moe, mlp, loop):
            module.zero_grad()

    print(
        f"{args.device}, {torch.get_num_threads()} threads: N={args.tokens} D={args.width} F={args.hidden} "
        f"E={args.experts} K={args.selected} {args.dtype}; largest difference in float32 {difference:.1e}"
    )
    print(f"{'':42}{'time':>12}{'faster than the masked loop':>30}")
    for run in (forward, forward_and_gradient):
        seconds = {name: [] for name in layers}
        for _ in range(args.rounds + 1):
            for name, layer in layers.items():
                began = time.perf_counter()
                run(layer)
                if args.device != "cpu":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - began)
        for name, taken in seconds.items():
            pairs = list(zip(seconds["masked loop"], taken, strict=True))[1:]  # without the first, a warm-up
            ratio = statistics.median(loop / own for loop, own in pairs)
            milliseconds = statistics.median(taken[1:]) * 1e3
            print(f"{f'{run.__name__}: {name}':42}{milliseconds:>9.1f} ms{ratio:>29.2f}x")


if __name__ == "__main__":
    main()
