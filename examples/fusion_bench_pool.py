"""A fusion_bench model pool that aligns what it loads: every fusion method then sees models that average well.

modelpool:
  _target_: examples.fusion_bench_pool.AlignedCausalLMPool
  models: {a: path/to/a, b: path/to/b}
  tokenizer: path/to/a
  data: text.txt
  options: {steps: 1200}
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from fusion_bench.modelpool import CausalLMPool

import lmc_fast as lmc


class AlignedCausalLMPool(CausalLMPool):
    """Two models of a CausalLMPool, aligned in memory on `data` (text or .npy token ids) when the first one is loaded.

    options: of lmc_fast.align. length: tokens per sequence. What else the pool holds is loaded as it is.
    """

    def __init__(
        self, models: Any, *, data: str, length: int = 128, options: Mapping[str, Any] | None = None, **more: Any
    ):
        super().__init__(models, **more)
        self.data, self.length, self.options = data, length, dict(options or {})

    @cached_property
    def aligned(self) -> dict[str, lmc.Stock]:
        pair = lmc.open_pair(*(super(AlignedCausalLMPool, self).load_model(name) for name in self.model_names))
        tokens = lmc.read_tokens(self.data, lmc.Model(self.get_model_path(self.model_names[0])), self.length)
        alignment = lmc.align(pair, tokens, **self.options)
        stocks = lmc.export(pair, alignment, in_memory=True, tokens=tokens)
        return dict(zip(self.model_names, stocks, strict=True))

    def load_model(self, model_name_or_config: Any, *args: Any, **kwargs: Any) -> Any:
        if model_name_or_config in self.model_names:
            return self.aligned[model_name_or_config].model(**self.get_model_kwargs(), **kwargs)
        return super().load_model(model_name_or_config, *args, **kwargs)
