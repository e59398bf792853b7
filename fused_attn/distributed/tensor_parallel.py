"""Tensor parallelism for ``nn.MultiheadAttention``, as a plan of ``torch.distributed.tensor.parallel.parallelize_module``."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from fused_attn.nn import MultiheadAttention, replace_multihead_attention

_PROJECTIONS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class HeadwiseParallel(ParallelStyle):
    """Every rank computes some heads of a ``nn.MultiheadAttention``, torch's or this package's (Megatron-LM, arXiv 1909.08053).

    The input projections are divided by heads, the output projection by its inputs, whose results are added up: one all-reduce forward and
    one backward, as for ``ColwiseParallel`` and ``RowwiseParallel`` around an attention. torch's layer becomes this package's in place. A
    packed ``in_proj_weight`` becomes torch's three separate ones, whose rows are heads, so load checkpoints of the plain layer before.

    Args:
        input_layouts: where query, key and value lie: ``Replicate()``, or ``Shard(dim)`` for sequence parallelism, which is gathered. Masks
            are those of the whole sequence, the same on every rank.
        output_layouts: where the output shall lie: ``Replicate()``, or ``Shard(dim)``, which scatters while it adds up.
        use_local_output: whether the output is a plain tensor instead of a DTensor. Returned weights are the same on every rank.

    Raises:
        TypeError: the module is no ``nn.MultiheadAttention``.
        ValueError: the ranks do not divide its heads, the mesh has several dimensions, or the layer is divided already.

    Example:
        >>> import tempfile, torch, torch.distributed as dist
        >>> from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
        >>> dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
        >>> layer, x = nn.TransformerEncoderLayer(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
        >>> expected = layer(x)
        >>> plan = {"self_attn": HeadwiseParallel(), "linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
        >>> layer = parallelize_module(layer, dist.init_device_mesh("cpu", (1,)), plan)
        >>> torch.allclose(layer(x), expected, atol=1e-5)
        True
        >>> dist.destroy_process_group()
    """

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None, use_local_output: bool = True
    ) -> None:
        super().__init__()
        self.input_layouts, self.output_layouts = input_layouts or Replicate(), output_layouts or Replicate()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        if type(module) is not nn.MultiheadAttention and not isinstance(module, MultiheadAttention):
            raise TypeError(f"HeadwiseParallel divides a nn.MultiheadAttention; got {type(module).__name__}. Name that layer in the plan.")
        if device_mesh.ndim != 1:
            raise ValueError(f"a mesh must have one dimension here; got {device_mesh.ndim}. Pass one of them, as mesh['tp'].")
        if isinstance(module.out_proj.weight, DTensor):
            raise ValueError("a layer must be divided once; got one whose parameters are DTensors. Apply the plan before FSDP2, and once.")
        if module.num_heads % device_mesh.size():
            raise ValueError(
                f"the ranks must divide num_heads; got {module.num_heads} heads on {device_mesh.size()} ranks. Take a mesh that divides them."
            )
        replace_multihead_attention(module, backend=getattr(module, "backend", "auto"))
        self._distribute(cast(MultiheadAttention, module), device_mesh)
        module.register_forward_pre_hook(lambda _, args, kwargs: self._placed(args, kwargs, device_mesh), with_kwargs=True)
        module.register_forward_hook(lambda *call: self._given_out(call[-1]))
        return module

    def _distribute(self, module: MultiheadAttention, mesh: Any) -> None:
        if module.in_proj_weight is not None:
            wants = module.in_proj_weight.requires_grad
            for name, part in zip(_PROJECTIONS, module.in_proj_weight.detach().chunk(3), strict=True):
                setattr(module, name, nn.Parameter(part.clone(), wants))
            module.register_parameter("in_proj_weight", None)
        rows = dict.fromkeys(_PROJECTIONS, Shard(0))
        for owner, names in (
            (module, rows | dict.fromkeys(("in_proj_bias", "bias_k", "bias_v"), Replicate())),
            (module.out_proj, {"weight": Shard(1), "bias": Replicate()}),
        ):
            for name, placement in names.items():
                parameter = getattr(owner, name)
                if parameter is not None:
                    placed = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=self.src_data_rank)
                    setattr(owner, name, nn.Parameter(placed, parameter.requires_grad))

    def _placed(self, args: tuple[Any, ...], kwargs: dict[str, Any], mesh: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Query, key and value as DTensors that are whole on every rank; one tensor passed twice stays one.

        Nested ones stay: the layer calls itself on padded ones for them.
        """
        known: dict[int, Any] = {}

        def placed(tensor: Any) -> Any:
            if tensor.is_nested:
                return tensor
            if id(tensor) not in known:
                given = tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [self.input_layouts], run_check=False)
                known[id(tensor)] = given.redistribute(placements=[Replicate()])
            return known[id(tensor)]

        inputs = {name: placed(t) for name, t in kwargs.items() if name in ("query", "key", "value")}
        return (*map(placed, args[:3]), *args[3:]), kwargs | inputs

    def _given_out(self, results: tuple[Any, Any]) -> tuple[Tensor, Tensor | None]:
        out, weights = results
        if out.is_nested:
            return out, weights
        out = out.redistribute(placements=[self.output_layouts])
        weights = None if weights is None else weights.redistribute(placements=[Replicate()])
        if not self.use_local_output:
            return out, weights
        return out.to_local(), None if weights is None else weights.to_local()
