"""Random group elements for tests, built from the definition of each group and not from the library's charts."""

import torch
from scipy.stats import ortho_group, special_ortho_group

from lmc_fast.architectures import Spec
from lmc_fast.symmetry import Transform
from lmc_fast.symmetry.elements import Dense, Wreath, units
from lmc_fast.symmetry.groups import unit_scale_signs


def rotation_fixing_ones(n: int, seed: int) -> torch.Tensor:
    basis = torch.linalg.qr(torch.cat([torch.ones(n, 1), torch.randn(n, n - 1)], 1).double())[0]
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = torch.from_numpy(ortho_group.rvs(n - 1, random_state=seed))
    return basis @ inner @ basis.T


def random_element(spec: Spec, seed: int) -> Transform:
    g = torch.Generator().manual_seed(seed)
    groups, r, e, rotary = (
        spec.attention.kv_heads,
        spec.attention.queries_per_group,
        spec.attention.head_dim,
        spec.rope.rotary_dim,
    )

    def general(n):
        q1, q2 = (torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0] for _ in range(2))
        return q1 @ torch.diag(0.5 + torch.rand(n, generator=g, dtype=torch.float64)) @ q2

    def query_key():
        n = torch.zeros(e, e, dtype=torch.float64)
        for i in range(rotary // 2):
            j = i + rotary // 2
            a, b = torch.randn(2, generator=g, dtype=torch.float64).tolist()
            n[i, i], n[i, j], n[j, i], n[j, j] = a, -b, b, a
        if rotary < e:
            n[rotary:, rotary:] = general(e - rotary)
        return n

    def permutations(count, n):
        return torch.stack([torch.randperm(n, generator=g) for _ in range(count)])

    def block():
        signs = unit_scale_signs(spec)
        scale = None if signs == "none" else 0.5 + torch.rand(spec.ffn.width, generator=g, dtype=torch.float64)
        if signs == "any":
            scale[::2] *= -1
        out = {"heads": Wreath(torch.randperm(groups, generator=g))}
        if r > 1:
            out["queries"] = Wreath(permutations(groups, r))
        out["vo"] = Dense.of(torch.stack([general(e) for _ in range(groups)]))
        out["qk"] = Dense.of(torch.stack([query_key() for _ in range(groups)]))
        return out | {"units": units(torch.randperm(spec.ffn.width, generator=g), scale)}

    if spec.norms.kind == "layernorm":
        rotation = rotation_fixing_ones(spec.width, seed)
    else:
        rotation = torch.from_numpy(special_ortho_group.rvs(spec.width, random_state=seed))
    return Transform({"stream": Dense.orthogonal(rotation)}, [block() for _ in range(spec.layers)])
